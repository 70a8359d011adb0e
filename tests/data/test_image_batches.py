"""Which images come when, and what is done to them, is a function of (seed, epoch, index) alone."""

import io
import itertools
import json

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from lowprec.data import DataConfig, load_images
from lowprec.data.image_batches import augmented, eval_batches, train_batches
from lowprec.data.images import image_data
from lowprec.errors import UsageError

SHAPE = (6, 5, 2)


@pytest.fixture(scope="module")
def numbered():
    """24 training images, each recognisable by its label, and 10 to evaluate."""
    rng = np.random.default_rng(0)
    images = lambda count: rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    return image_data("numbered/1.0.0", 24, images(24), np.arange(24, dtype=np.int32), images(10), np.arange(10) % 24)


def take(batches, count):
    rows = list(itertools.islice(batches, count))
    batches.close()
    return {name: np.concatenate([row[name] for row in rows]) for name in ("image", "label")}


AUGMENTED = {"shift": 2, "flip": True}


def test_each_image_once_an_epoch_in_a_new_order(numbered):
    labels = take(train_batches(numbered, batch_size=5, seed=0), 15)["label"][:72].reshape(3, 24)
    assert all(sorted(epoch) == list(range(24)) for epoch in labels)
    assert len({tuple(epoch) for epoch in labels}) == 3
    other = take(train_batches(numbered, batch_size=5, seed=1), 5)["label"][:24]
    assert tuple(other) != tuple(labels[0])


def test_rows_are_normalized_images(numbered):
    batch = take(train_batches(numbered, batch_size=24, seed=0), 1)
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
    np.testing.assert_allclose(batch["image"].mean((0, 1, 2), np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(batch["image"].std((0, 1, 2), dtype=np.float64), 1, rtol=1e-6)
    pixels = batch["image"] * numbered.std + numbered.mean
    np.testing.assert_allclose(pixels, numbered.train_images[batch["label"]], atol=1e-3)


def test_augmentation_is_that_of_seed_epoch_and_index(numbered):
    """Neither the size of a batch nor the number of processes matters; each epoch has its own."""
    whole = take(train_batches(numbered, batch_size=24, seed=3, **AUGMENTED), 2)
    small = take(train_batches(numbered, batch_size=4, seed=3, **AUGMENTED), 12)
    for name in ("image", "label"):
        np.testing.assert_array_equal(whole[name], small[name])
    by_label = lambda rows: rows["image"][np.argsort(rows["label"])]
    first, second = ({name: rows[part] for name, rows in whole.items()} for part in (slice(24), slice(24, 48)))
    assert np.any(by_label(first) != by_label(second))
    other_seed = take(train_batches(numbered, batch_size=24, seed=4, **AUGMENTED), 1)
    assert np.any(by_label(first) != by_label(other_seed))


def test_processes_share_the_batch_of_one(numbered):
    alone = take(train_batches(numbered, batch_size=8, seed=3, **AUGMENTED), 6)
    parts = [
        take(train_batches(numbered, batch_size=8, seed=3, process_index=index, process_count=2, **AUGMENTED), 6)
        for index in range(2)
    ]
    for name, rows in alone.items():
        both = [part[name].reshape(6, 4, *rows.shape[1:]) for part in parts]
        np.testing.assert_array_equal(np.concatenate(both, axis=1).reshape(rows.shape), rows)


@pytest.mark.parametrize("taken", [0, 1, 4, 7])
def test_resuming_goes_on_with_the_next_batch(numbered, taken):
    """The state goes through JSON, as checkpoints store it; batches end inside epochs."""
    batches = train_batches(numbered, batch_size=7, seed=2, **AUGMENTED)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 5)
    again = train_batches(numbered, batch_size=7, seed=2, **AUGMENTED)
    again.set_state(state)
    found = take(again, 5)
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows)


def test_a_position_of_other_batches_is_refused(numbered):
    state = train_batches(numbered, batch_size=8, seed=2).get_state()
    with pytest.raises(UsageError, match="shift=0, this one has 1"):
        train_batches(numbered, batch_size=8, seed=2, shift=1).set_state(state)


def test_an_augmented_image_is_a_crop_of_the_padded_one_mirrored_half_of_the_times():
    """400 draws: each of 25 crops has 16 in the mean, and one is missing with probability below 25 · e^-16 = 3e-6."""
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = {padded[i : i + 6, j : j + 5].tobytes(): (i, j) for i, j in itertools.product(range(5), repeat=2)}
    rng, found, mirrored = np.random.default_rng(1), set(), 0
    for _ in range(400):
        crop = augmented(image, rng, shift=2, flip=True)
        straight = np.ascontiguousarray(crop).tobytes()
        mirrored += straight not in crops
        found.add(crops.get(straight) or crops[np.ascontiguousarray(crop[:, ::-1]).tobytes()])
    assert found == set(crops.values())
    # Five standard deviations of the binomial distribution.
    assert abs(mirrored - 200) < 5 * 10


def test_evaluation_sees_every_image_once_as_it_is(numbered):
    batches = eval_batches(numbered, batch_size=4, batches=5)
    assert [batch["weight"].tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    images = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(images[:10], numbered.normalized(numbered.eval_images))
    assert not images[10:].any()
    fewer = eval_batches(numbered, batch_size=2, batches=2)
    assert np.concatenate([batch["label"] for batch in fewer]).tolist() == [0, 2, 5, 7]


def test_what_cannot_be_served_is_refused(numbered):
    for changes, message in (
        ({"batch_size": 25}, "24 training images, less than one batch"),
        ({"batch_size": 8, "process_count": 3}, "can't be shared evenly by 3"),
        ({"batch_size": 8, "shift": 5}, "data.shift is 0 … 4"),
        ({"batch_size": 8, "seed": -1}, "seed is 0"),
    ):
        with pytest.raises(UsageError, match=message):
            train_batches(numbered, **{"seed": 0, **changes})


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A stand-in with the layout of the real cifar10: an id beside image and label, splits train and test."""

    name = "cifar10"
    VERSION = tfds.core.Version("3.0.2")

    def _info(self):
        image = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")
        features = {"id": tfds.features.Text(), "image": image, "label": tfds.features.ClassLabel(num_classes=10)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 26)}

    def _generate_examples(self, start, stop):
        for index in range(start, stop):
            image = io.BytesIO()
            PIL.Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(image, "png")
            image.seek(0)
            yield index, {"id": str(index), "image": image, "label": index % 10}


def test_prepared_sets_with_image_and_label_are_read(tmp_path):
    Cifar10(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    config = DataConfig("cifar10", data_dir=str(tmp_path), eval_split="test")
    data = load_images(config)
    assert (data.name, data.classes, data.shape) == ("cifar10/3.0.2", 10, (8, 8, 3))
    assert data.train_images[:, 0, 0, 0].tolist() == list(range(20))
    assert data.eval_labels.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(data.mean, np.arange(20).mean())
    np.testing.assert_allclose(data.std, np.arange(20).std(), rtol=1e-6)
    with pytest.raises(UsageError, match=r"no split 'validation' in cifar10.*train, test"):
        load_images(DataConfig("cifar10", data_dir=str(tmp_path)))


def test_a_set_of_text_is_not_one_of_images(tmp_path):
    with pytest.raises(UsageError, match="'stdlib_text' is a set of text"):
        load_images(DataConfig("stdlib_text", data_dir=str(tmp_path)))
