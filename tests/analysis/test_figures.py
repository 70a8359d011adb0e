"""Figures of notebooks: one folder a process, or the one that is named."""

import matplotlib
import matplotlib.pyplot as plt
import pytest

from lowprec.analysis.figures import show


@pytest.fixture(autouse=True)
def without_a_display():
    before = matplotlib.get_backend()
    plt.switch_backend("Agg")
    yield
    plt.switch_backend(before)


def shown(capsys, name):
    figure, panel = plt.subplots()
    panel.plot([0, 1])
    show(figure, name)
    assert not plt.fignum_exists(figure.number)
    return capsys.readouterr().out.removeprefix("figure: ").strip()


def test_a_figure_is_written_where_it_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LOWPREC_FIGURES", str(tmp_path / "new"))
    assert shown(capsys, "one") == str(tmp_path / "new/one.png")
    assert (tmp_path / "new/one.png").read_bytes().startswith(b"\x89PNG")


def test_or_into_one_temporary_folder(capsys, monkeypatch):
    monkeypatch.delenv("LOWPREC_FIGURES", raising=False)
    first, second = shown(capsys, "one"), shown(capsys, "two")
    assert first.removesuffix("one.png") == second.removesuffix("two.png")
    assert "lowprec-figures-" in first
