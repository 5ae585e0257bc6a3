"""Data sets with splits: what is trained and evaluated on, by name, and rows without labels in any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

datasets = pytest.importorskip("datasets")

from zokern.finetune import FinetuneError, Options, data  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def part(
    name: str, count: int, missing: tuple[int, ...] = (), *, names: bool = True, blank: tuple[int, ...] = ()
) -> Any:
    label = datasets.ClassLabel(names=["pos", "neg"]) if names else datasets.Value("int64")
    features = datasets.Features(text=datasets.Value("string"), label=label, idx=datasets.Value("int64"))
    labels = [-1 if i in missing else i % 2 for i in range(count)]
    texts = ["" if i in blank else f"{name} {i}" for i in range(count)]
    return datasets.Dataset.from_dict({"text": texts, "label": labels, "idx": list(range(count))}, features=features)


def saved(path: Path, **parts: Any) -> str:
    datasets.DatasetDict(parts).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("names", [True, False], ids=["ClassLabel", "int64"])
@pytest.mark.parametrize("missing", [(0,), (20,), (89,), (3, 4, 5)])
def test_rows_without_a_label_are_left_out_wherever_they_stand(
    missing: tuple[int, ...], names: bool, tmp_path: Path
) -> None:
    train, validation = part("t", 90, missing, names=names), part("v", 90, missing, names=names)
    blind = part("b", 5, tuple(range(5)), names=names)
    loaded = data.load(Options(data=saved(tmp_path / "d", train=train, validation=validation, test=blind)))
    assert len(loaded.train) == len(loaded.eval) == 90 - len(missing)
    assert loaded.labels == (["pos", "neg"] if names else ["0", "1"])
    counts = loaded.record()["left_out"]
    assert [list(counts[name].values()) for name in ("train", "eval")] == [[len(missing)]] * 2
    assert f"evaluated on {tmp_path / 'd'}, split 'validation'" in loaded.notes


def test_a_directory_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    part("t", 90, (20,)).to_parquet(tmp_path / "x" / "train-0.parquet")
    loaded = data.load(Options(data=str(tmp_path / "x")))
    assert len(loaded.train) + len(loaded.eval) == 89


def test_a_part_is_unlabelled_only_if_all_of_it_is(tmp_path: Path) -> None:
    blind = part("b", 5, tuple(range(5)))
    name = saved(tmp_path / "d", train=part("t", 30), validation=blind, test=part("e", 6, (0, 1)))
    loaded = data.load(Options(data=name))
    assert sorted(loaded.eval.texts) == [f"e {i}" for i in range(2, 6)]
    assert "split 'validation' is not used: none of its 5 rows has a text and a label" in loaded.notes
    name = saved(tmp_path / "e", train=part("t", 30), test=blind)
    assert len(data.load(Options(data=name)).eval) == 6  # held out
    with pytest.raises(FinetuneError, match="split 'test': no row has a text and a label; 5 rows left out"):
        data.load(Options(data=name, eval_split="test"))


def test_an_empty_text_does_not_forbid_a_data_set(tmp_path: Path) -> None:
    name = saved(tmp_path / "d", train=part("t", 30, blank=(17,)), validation=part("v", 8, blank=(0, 1)))
    loaded = data.load(Options(data=name))
    assert (len(loaded.train), len(loaded.eval)) == (29, 6)
    assert any("1 row left out, as its text is empty: first" in n and "row 17" in n for n in loaded.notes)


@pytest.mark.parametrize("key", ["validation", "valid", "dev", "validation_matched", "eval", "test"])
def test_splits_to_evaluate_on_are_found(key: str, tmp_path: Path) -> None:
    name = saved(tmp_path / "d", **{"train": part("t", 30), key: part("v", 8), "other": part("o", 4)})
    loaded = data.load(Options(data=name))
    assert sorted(loaded.eval.texts) == [f"v {i}" for i in range(8)]
    assert f"evaluated on {name}, split {key!r}" in loaded.notes


def test_splits_may_be_asked_for(tmp_path: Path) -> None:
    name = saved(tmp_path / "d", part_a=part("a", 20), part_b=part("b", 10))
    loaded = data.load(Options(data=name))
    assert loaded.train.texts[0].startswith("a ")
    assert f"{name} has no split 'train': 'part_a' is trained on (see --split)" in loaded.notes
    assert any(note.startswith("splits that are not used: part_b") for note in loaded.notes)
    loaded = data.load(Options(data=name, split="part_b", eval_split="part_a"))
    assert (len(loaded.train), len(loaded.eval)) == (10, 20)
    with pytest.raises(FinetuneError, match=r"--eval-split: .* has no split 'c'; its splits are part_a, part_b"):
        data.load(Options(data=name, eval_split="c"))
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"t {i},{('pos', 'neg')[i % 2]}\n" for i in range(10)))
    with pytest.raises(FinetuneError, match=r"--eval-split is 'part_a', but .* is one file"):
        data.load(Options(data=str(tmp_path / "t.csv"), eval_split="part_a"))
    loaded = data.load(Options(data=str(tmp_path / "t.csv"), eval_data=name, eval_split="part_b"))
    assert (len(loaded.train), len(loaded.eval)) == (10, 10)
    both = saved(tmp_path / "e", train=part("t", 20), validation=part("v", 6))
    loaded = data.load(Options(data=str(tmp_path / "t.csv"), eval_data=both))
    assert sorted(loaded.eval.texts) == [f"v {i}" for i in range(6)]


def test_a_saved_dataset_without_splits(tmp_path: Path) -> None:
    part("t", 30).save_to_disk(tmp_path / "one")
    loaded = data.load(Options(data=str(tmp_path / "one")))
    assert len(loaded.train) + len(loaded.eval) == 30


def test_a_colon_in_a_directorys_name(tmp_path: Path) -> None:
    for name in ("a:b", "c"):
        (tmp_path / name).mkdir()
        part("t", 30).to_csv(tmp_path / name / "train.csv")
        assert len(data.load(Options(data=str(tmp_path / name))).eval) == 6
    assert len(data.load(Options(data=saved(tmp_path / "d:e:f", train=part("t", 30)))).eval) == 6
