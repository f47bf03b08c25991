"""Tests of text datasets: vocabulary, splits and rejected files."""

from collections import Counter
from pathlib import Path

import pytest

from export.datasets import loading, text


def test_load_standard_library_text_gives_characters_in_three_splits() -> None:
    dataset = loading.load("text")
    assert dataset.spec.vocabulary == text.CHARACTERS
    assert len(dataset.spec.vocabulary) == 97
    splits = [dataset.validation, dataset.train, dataset.test]
    whole = "".join("".join(text.to_strings(split.rows, text.CHARACTERS)) for split in splits)
    assert len(whole) > 200_000
    assert set(whole) <= set(text.CHARACTERS)
    assert text.lengths(dataset.test.rows).sum() / len(whole) == pytest.approx(0.1, abs=0.001)
    paragraphs = Counter(paragraph for paragraph in whole.split("\n\n") if len(paragraph) > 80)
    assert max(paragraphs.values()) == 1


def test_load_folder_takes_the_vocabulary_from_its_text(tmp_path: Path) -> None:
    content = "né à Zürich\n" * 2000
    (tmp_path / "input.txt").write_text(content, encoding="utf-8")
    dataset = loading.load("digits", tmp_path)
    assert dataset.spec.vocabulary == ("", *sorted(set(content)))
    (first,) = text.to_strings(dataset.test.rows[:1], dataset.spec.vocabulary)
    assert first == content[int(len(content) * 0.9) :][: text.CONTEXT]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("short", r"expected at least \d+ characters, got 5"),
        ("".join(map(chr, range(32, 400))) * 100, "expected at most 255 different characters, got 368"),
    ],
)
def test_load_folder_rejects_text_that_is_too_short_or_too_diverse(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "input.txt").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        loading.load("digits", tmp_path)
