"""Pictures are written whole, alike each time, and with their fonts."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from spt_kernels.files import fonts
from spt_kernels.files.picture import new_figure, save_picture

OF_STIX = "\u1d84"  # which the font of our pictures lacks


def drawn():
    figure = new_figure(1.0, 2.0)
    figure.add_subplot().plot([1, 2], label="a line")
    figure.axes[0].legend()
    return figure


@pytest.mark.parametrize(
    ("kind", "opening"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_same_picture_is_the_same_bytes(kind: str, opening: bytes, tmp_path: Path) -> None:
    for name in ("first", "second"):
        save_picture(drawn(), tmp_path / f"{name}.{kind}")
    first, second = (tmp_path / f"{name}.{kind}" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(opening)
    assert b"Date" not in first.read_bytes()


def test_a_png_has_the_dots_that_the_figure_says(tmp_path: Path) -> None:
    """Also where they were changed after the figure was made, which `savefig` does not see."""
    figure = drawn()
    figure.set_dpi(100)
    save_picture(figure, tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (200, 100)


def test_letters_of_a_pdf_are_of_an_embedded_font(tmp_path: Path) -> None:
    save_picture(drawn(), tmp_path / "a.pdf")
    data = (tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in data  # TrueType, as journals ask for
    assert b"/Type3" not in data


def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_picture(drawn(), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_letters_that_no_font_has_are_told_in_one_line(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fonts, "_letters_of_fonts", dict)
    figure = drawn()
    figure.suptitle("\u86d9, \u86d9 and \u732b")  # of a font that matplotlib does not bring
    save_picture(figure, tmp_path / "frog.png")
    [line] = caplog.messages
    assert line.startswith(f"{tmp_path / 'frog.png'}: boxes stand for letters")
    assert set(line.rpartition(": ")[2]) == set("\u86d9\u732b")
    assert not recwarn.list


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"as a.png, a.pdf or a.svg, got .*a.gif"):
        save_picture(drawn(), tmp_path / "a.gif")


def test_no_other_code_writes_pictures() -> None:
    """What matplotlib writes by itself is half a file when a kill comes between."""
    root = Path(__file__).parents[2]
    files = [path for folder in ("spt_kernels", "bench") for path in (root / folder).rglob("*.py")]
    by_itself = [path.name for path in files if ".savefig(" in path.read_text()]
    assert by_itself == ["picture.py"]


def test_a_letter_is_of_the_font_that_has_it(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def saved(name: str) -> bytes:
        figure = drawn()
        figure.suptitle(f"{OF_STIX} and more")
        save_picture(figure, tmp_path / name)
        return (tmp_path / name).read_bytes()

    with monkeypatch.context() as without:
        without.setattr(fonts, "_letters_of_fonts", dict)
        box = saved("box.png")
    caplog.clear()
    letter = saved("letter.png")
    assert not caplog.messages
    assert not recwarn.list
    assert letter != box
    assert saved("again.png") == letter


def test_as_few_fonts_as_have_the_most_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = {"Serif": "abc", "A Sans": "abc", "Other": "cd", "Small": "d", "None": "xyz"}
    known = {name: frozenset(map(ord, has)) for name, has in letters.items()}
    monkeypatch.setattr(fonts, "_letters_of_fonts", lambda: known)
    assert fonts.fonts_with("abc") == ["A Sans"]
    assert fonts.fonts_with("dabq") == ["A Sans", "Small"]
    assert fonts.fonts_with("cd") == ["Other"]
    assert fonts.fonts_with("qw") == []
    assert fonts.fonts_with("") == []


def test_the_fonts_of_this_machine_are_read() -> None:
    (name,) = fonts.fonts_with(OF_STIX)
    assert not name.startswith("Last Resort")
