"""tensorflow stays out, even where it is installed; heavy libraries wait until they are used."""

import os
import subprocess
import sys


def run(code: str, *paths: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_preparing_reading_and_batching_never_import_tensorflow(tmp_path):
    # A tensorflow that can be imported, so that any attempt shows in sys.modules.
    (tmp_path / "fake" / "tensorflow").mkdir(parents=True)
    (tmp_path / "fake" / "tensorflow" / "__init__.py").write_text("__version__ = '9.9'\n")
    code = f"""
import sys
from lowprec.data import DataConfig, eval_batches, load, train_batches
from lowprec.errors import UsageError
data = load(DataConfig("markov_text/vocab8-size4000", data_dir={str(tmp_path)!r}))
next(train_batches(data, seq_len=8, batch_size=4, seed=0))
eval_batches(data, seq_len=8, batch_size=4, batches=2)
for name in ("lm1b", "no_such_set"):
    try:
        load(DataConfig(name, data_dir={str(tmp_path)!r}))
    except UsageError:
        pass
print("tensorflow" in sys.modules, "tensorflow_datasets" in sys.modules)
import tensorflow
print("tensorflow" in sys.modules)
"""
    assert run(code, str(tmp_path / "fake")).split() == ["False", "True", "True"]


def test_importing_the_package_imports_no_heavy_library():
    heavy = ("tensorflow_datasets", "grain", "tokenizers", "sklearn", "jax")
    code = f"import sys, lowprec.data; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(code).strip() == "[]"
