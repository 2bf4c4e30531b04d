"""Text, names and paths that come from other programs."""

import pytest

from lagm.core.errors import InputError, printable, same_name
from lagm.core.files import decode_text, inside, parse_json, read_json, read_lines, read_text
from lagm.core.origins import install_advice

TEXT = "Zoë\r\nÅsa\n"


@pytest.mark.parametrize("content", [TEXT.encode(), b"\xef\xbb\xbf" + TEXT.encode(),
                                     b"\xff\xfe" + TEXT.encode("utf-16-le"), b"\xfe\xff" + TEXT.encode("utf-16-be")])
def test_text_of_any_system(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert decode_text(content) == read_text(tmp_path / "a.txt") == TEXT
    assert read_lines(tmp_path / "a.txt") == ["Zoë", "Åsa"]


@pytest.mark.parametrize("content", ["Zoë".encode("latin-1"), b"\xff\xfea", b"ab\x80"])
def test_no_text(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match="a.txt is not text in UTF-8"): read_text(tmp_path / "a.txt")
    with pytest.raises(InputError, match="^the list is not text"): decode_text(content, "the list")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot read .*none.txt: No such file"): read_text(tmp_path / "none.txt")
    with pytest.raises(InputError, match="cannot read"): read_text(tmp_path)
    with pytest.raises(InputError, match="cannot read"): read_text("a\0b")
    (tmp_path / "a.txt").write_bytes(b"12345")
    assert read_text(tmp_path / "a.txt", 5) == "12345"
    with pytest.raises(InputError, match="larger than 4 bytes"): read_text(tmp_path / "a.txt", 4)


def test_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one \r\n\r\n two words\t\rthree\n\n")
    assert read_lines(tmp_path / "a.txt") == ["one", "two words", "three"]
    (tmp_path / "a.txt").write_bytes(b"")
    assert read_lines(tmp_path / "a.txt") == []


def test_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": [1, 2.5, null]}\r\n')
    assert read_json(tmp_path / "a.json") == parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    for text in ("{", "", "[1,]", "1" * 5000):
        with pytest.raises(InputError, match="the text is not JSON"): parse_json(text)
    with pytest.raises(InputError, match="x.json is nested too deeply"): parse_json("[" * 200_000, "x.json")


@pytest.mark.parametrize("name, below", [("a.png", "a.png"), ("x/a.png", "x/a.png"), ("x\\a.png", "x/a.png"),
                                         ("./x//a.png", "x/a.png"), ("..a/b..", "..a/b..")])
def test_names_that_stay_inside(name, below):
    assert inside("data", name).as_posix() == f"data/{below}"


@pytest.mark.parametrize("name", ["", ".", "/a", "\\a", "../a", "x/../../a", "x\\..\\a", "C:\\a", "c:a", "//server/a",
                                  "\\\\server\\a", "a\0b", ".."])
def test_names_that_lead_out(name):
    with pytest.raises(InputError, match="leads out of the folder data"): inside("data", name)


def test_printable():
    assert printable("Zoë 3.5") == "Zoë 3.5" and printable(7) == "7"
    assert printable("a\x1b[31m\n\u202eb\x00") == r"a\x1b[31m\n\u202eb\x00"
    assert printable("x" * 201) == "x" * 200 + "…" and printable("abcdef", 3) == "abc…"
    assert printable("\udc80") == r"\udc80"


def test_same_name():
    assert "e\u0301" != "é" and same_name("e\u0301") == same_name("é") == "é"
    assert same_name("A.PNG") == "A.PNG"


def test_install_advice():
    advice = install_advice("pascal")
    assert (advice.startswith("python -m pip install '") and "scipy>=" in advice and "pycocotools>=" in advice
            and "lagm" not in advice and "torch" not in advice)
    with pytest.raises(ValueError, match="no extra 'nothing'"): install_advice("nothing")
