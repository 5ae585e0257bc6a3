"""Files as their owners have them: dialects, encodings, gaps and lists; each is read rightly, or refused by line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

datasets = pytest.importorskip("datasets")

from zokern.finetune import FinetuneError, Options, data  # noqa: E402
from zokern.finetune.rows import Part  # noqa: E402

QUOTE = '"'


def read(path: Path, **options: Any) -> Part:
    return data.read(str(path), Options(**options))[0]


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding))
    return path


# ------------------------------------------------------------------------------------------------------- CSV and TSV


def test_a_tsv_is_read_without_quotes(tmp_path: Path) -> None:
    """GLUE's files: two texts that begin and end with a lone quote, far apart."""
    rows = [(f"{QUOTE if i == 3 else ''}a film {i}{QUOTE if i == 30 else ''}", str(i % 2)) for i in range(40)]
    rows[5] = ('"Good" film', "1")
    path = write(tmp_path / "q.tsv", "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    assert read(path).pairs == rows
    assert read(write(tmp_path / "r.TSV", path.read_text().replace("\n", "\r\n"))).pairs == rows


def test_quotes_of_another_dialect_are_told(tmp_path: Path) -> None:
    with (tmp_path / "q.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("text", "label"), ('he said "so"', "1"), ("no", "0")])
    part = read(tmp_path / "q.tsv")
    assert part.pairs[0][0] == '"he said ""so"""'
    assert "1 texts stand in quotes" in part.notes[0]


def swallowing(first: int, last: int, label_first: bool) -> str:
    """A .csv in which one text begins with a quote and a later one ends with one."""
    lines = ["label,text" if label_first else "text,label"]
    for i in range(40):
        text = f"{QUOTE if i == first else ''}a film {i}{QUOTE if i == last else ''}"
        lines.append(f"{i % 2},{text}" if label_first else f"{text},{i % 2}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("label_first", [False, True])
@pytest.mark.parametrize("last", [4, 5, 30])
def test_a_csv_whose_quotes_swallow_lines_is_refused_by_line(last: int, label_first: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", swallowing(3, last, label_first))
    with pytest.raises(FinetuneError, match=rf"q\.csv, line 5: a quote opens here and closes on line {last + 2}"):
        read(path)


def test_the_remedies_for_quotes_work(tmp_path: Path) -> None:
    """Each is tried: doubled quotes, .tsv and .jsonl."""
    rows = [(f"{QUOTE if i == 3 else ''}a film {i}", str(i % 2)) for i in range(40)]
    with pytest.raises(
        FinetuneError, match=r'q\.csv, in the row that begins on line 5: .*doubled \(""\).*\.tsv.*\.jsonl'
    ):
        read(write(tmp_path / "q.csv", swallowing(3, -1, False)))
    write(tmp_path / "ok.csv", swallowing(3, -1, False).replace('"a film 3', '"""a film 3"'))
    write(tmp_path / "ok.tsv", swallowing(3, -1, False).replace(",", "\t"))
    write(tmp_path / "ok.jsonl", "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    for name in ("ok.csv", "ok.tsv", "ok.jsonl"):
        assert read(tmp_path / name).pairs == rows


def test_a_quote_that_closes_inside_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="begins on line 3"):
        read(write(tmp_path / "q.csv", 'text,label\na,1\n"Good" film,0\n'))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
            st.sampled_from("abc"),
        ),
        min_size=1,
    )
)
def test_what_a_csv_writer_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    """Line breaks, quotes and commas in texts included: a legal text of several lines is one text."""
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    assert read(path).pairs == [(text.strip(), label) for text, label in rows if text.strip()]


def test_letters_of_several_lines_are_legal(tmp_path: Path) -> None:
    letters = [
        ("Dear sir,\n\nthe film, as I said,\nwas good\nbye", "1"),
        ("no", "0"),
        ("a,1\nis what I gave\nit, 0 stars", "1"),
    ]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *letters])
    assert read(tmp_path / "t.csv").pairs == letters


def test_a_long_text_and_the_limit_of_the_process(tmp_path: Path) -> None:
    long, before = "word " * 40_000 + "end", csv.field_size_limit(1000)
    assert read(write(tmp_path / "t.csv", f"text,label\n{long},1\n")).pairs == [(long, "1")]
    assert csv.field_size_limit(before) == 1000


@pytest.mark.parametrize("name", ["T.CSV", "t.csv.gz", "t.Tsv.GZ", "t.jsonl.gz", "t.json", "t.json.gz", "t.parquet"])
def test_every_kind_of_file(name: str, tmp_path: Path) -> None:
    rows = [{"text": f"é {i}", "label": "ab"[i % 2]} for i in range(4)]
    path, low = tmp_path / name, name.lower()
    if low == "t.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        comma = "\t" if "tsv" in low else ","
        text = comma.join(rows[0]) + "\n" + "".join(comma.join(row.values()) + "\n" for row in rows)
        if ".json" in low:
            text = "\n".join(map(json.dumps, rows)) if ".jsonl" in low else json.dumps(rows, indent=1)
        raw = b"\xef\xbb\xbf" + text.encode()
        path.write_bytes(gzip.compress(raw) if low.endswith("gz") else raw)
    Options(data=str(path), output=tmp_path / "out").check()
    assert read(path).pairs == [(row["text"], row["label"]) for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,1\nmus\xe9e,0\n".encode("latin-1"), r"a\.csv, line 3: the byte 0xe9 is not UTF-8"),
        ("a.csv", "text,label\nx,1\n".encode("utf-16"), r"a\.csv: this is UTF-16"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-le"), r"a\.jsonl: this is UTF-16"),
        ("a.csv", b"", r"a\.csv: empty"),
        ("a.csv", b"text,label\nhello\n", r"a\.csv, line 2: 1 values for 2 columns"),
        ("a.tsv", b"text\tlabel\nx\t1\na\tb\tc\n", r"a\.tsv, line 3: 3 values for 2 columns; .*without quotes"),
        ("a.csv", b"text;label\nx;1\n", r"a\.csv, line 1: one column, .* this has ';'"),
        ("a.csv", b"text,label,text\nx,1,y\n", r"a\.csv, line 1: 2 columns are named 'text'"),
        ("a.json", b'[{"text": "x", "label": 1}, 3]', r"a\.json, item 2: a JSON object is needed"),
        ("a.json", b'[{"text": "x", "label": 1},', r"a\.json: not valid JSON"),
        ("a.csv.gz", b"text,label\nx,1\n", r"a\.csv\.gz: cannot be read"),
        ("a.parquet", b"text,label\nx,1\n", r"a\.parquet: cannot be read as parquet"),
        ("a.jsonl", b'{"text": ["a", "b"], "label": 1}', r"line 1: column 'text' has a list.*--text-column"),
        ("a.jsonl", b'{"text": {"a": "b"}, "label": 1}', r"line 1: column 'text' has an object"),
        ("a.jsonl", b'{"text": true, "label": 1}', r"line 1: column 'text' has True, which is no text"),
        ("a.jsonl", b'{"text": "a", "label": [1, 2]}', r"line 1: column 'label' has a list.*--label-column"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FinetuneError, match=message):
        read(tmp_path / name)


def test_a_parquet_file_keeps_its_classes_and_categories(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["World", "Sports"]))
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(
        tmp_path / "c.parquet"
    )
    part = read(tmp_path / "c.parquet")
    assert (part.pairs, part.names) == ([("a", "World"), ("b", "Sports")], ["World", "Sports"])
    pq.write_table(
        pa.table({"text": ["a", "b"], "label": pa.array(["x", "y"]).dictionary_encode()}), tmp_path / "d.parquet"
    )
    assert read(tmp_path / "d.parquet").pairs == [("a", "x"), ("b", "y")]


# ------------------------------------------------------------------------------------------------- rows that are left out


@pytest.mark.parametrize("missing", [-1, "-", None, "", float("nan")])
def test_rows_without_a_label_are_left_out_and_counted(missing: Any, tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": missing if i in (0, 7) else i % 2} for i in range(20)]
    write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    part = read(tmp_path / "t.jsonl")
    assert part.pairs == [(row["text"], str(row["label"])) for i, row in enumerate(rows) if i not in (0, 7)]
    assert part.left_out.counts == {"no label": 2}
    assert part.left_out.said()[0].startswith(
        "2 rows left out, as they have no label (an empty one, or what --unlabelled"
    )
    assert part.left_out.said()[0].endswith("t.jsonl, line 1")


def test_minus_one_may_be_a_label_of_the_users(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", "text,label\n" + "".join(f"t {i},{i % 3 - 1}\n" for i in range(30)))
    assert data.load(Options(data=str(tmp_path / "t.csv"))).labels == ["0", "1"]
    assert data.load(Options(data=str(tmp_path / "t.csv"), unlabelled="")).labels == ["-1", "0", "1"]
    write(tmp_path / "u.csv", "text,label\n" + "".join(f"t {i},{i % 2 * 2 - 1}\n" for i in range(30)))
    with pytest.raises(FinetuneError, match=r"needs two labels; 15 rows left out.*--unlabelled"):
        data.load(Options(data=str(tmp_path / "u.csv")))


def test_empty_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    write(
        tmp_path / "t.csv", "text,label\n" + "".join(f"{'' if i in (4, 5) else f't {i}'},{i % 2}\n" for i in range(30))
    )
    loaded = data.load(Options(data=str(tmp_path / "t.csv")))
    assert len(loaded.train) + len(loaded.eval) == 28
    assert loaded.record()["left_out"]["train"] == {"no text": 2}
    assert any(
        "train: 2 rows left out, as their text is empty: first" in note and "line 6" in note for note in loaded.notes
    )
    write(tmp_path / "e.csv", "text,label\n,1\n,0\n")
    with pytest.raises(FinetuneError, match="no row has a text and a label: 2 rows left out"):
        data.load(Options(data=str(tmp_path / "e.csv")))


def test_booleans_and_numbers_as_labels(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "\n".join(json.dumps({"text": f"t {i}", "label": i % 2 == 0}) for i in range(20)))
    loaded = data.load(Options(data=str(tmp_path / "b.jsonl")))
    assert loaded.labels == ["False", "True"]
    assert any("labels are booleans" in note for note in loaded.notes)
    write(tmp_path / "f.csv", "text,label\n" + "".join(f"t {i},{('0', '0.0', '1', '1.0')[i % 4]}\n" for i in range(40)))
    assert data.load(Options(data=str(tmp_path / "f.csv"))).labels == ["0", "1"]
    write(tmp_path / "v.csv", "text,label\n" + "".join(f"t {i},{('1.0', '1.5', '01')[i % 3]}\n" for i in range(40)))
    assert set(data.load(Options(data=str(tmp_path / "v.csv"))).labels) == {"1.0", "1.5", "01"}


# ----------------------------------------------------------------------------------------------- what is no classification


def test_scores_and_answers_are_refused_as_such(tmp_path: Path) -> None:
    write(tmp_path / "s.csv", "text,label\n" + "".join(f"t {i},{i % 50 / 10}\n" for i in range(1000)))
    with pytest.raises(FinetuneError, match=r"50 labels in 1000 rows.*regression is not supported"):
        data.load(Options(data=str(tmp_path / "s.csv")))
    write(
        tmp_path / "a.jsonl",
        "\n".join(json.dumps({"text": f"t {i}", "label": f"so {i}, {'long ' * 20}"}) for i in range(5000)),
    )
    with pytest.raises(FinetuneError, match="these look like answers, which --answer COLUMN learns to write") as error:
        data.load(Options(data=str(tmp_path / "a.jsonl")))
    assert len(str(error.value)) < 700


def test_labels_that_no_training_text_has(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", "text,label\n" + "".join(f"t {i},{'ab'[i % 2]}\n" for i in range(30)))
    write(tmp_path / "e.csv", "text,label\n" + "".join(f"e {i},{'ab'[i % 2] if i else 'c'}\n" for i in range(10)))
    loaded = data.load(Options(data=str(tmp_path / "t.csv"), eval_data=str(tmp_path / "e.csv")))
    assert (len(loaded.eval), loaded.labels) == (9, ["a", "b"])
    assert loaded.record()["left_out"]["eval"] == {"unknown label": 1}
    write(tmp_path / "x.csv", "text,label\n" + "".join(f"e {i},answer {i}\n" for i in range(5000)))
    with pytest.raises(FinetuneError, match=r"5000 of 5000 .* and 4995 more; training has 'a', 'b'") as error:
        data.load(Options(data=str(tmp_path / "t.csv"), eval_data=str(tmp_path / "x.csv")))
    assert len(str(error.value)) < 700


def test_texts_in_both_sets_are_told(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", "text,label\n" + "".join(f"t {i},{'ab'[i % 2]}\n" for i in range(30)))
    name = str(tmp_path / "t.csv")
    assert (
        "WARNING: 30 of the texts to evaluate on are trained on too"
        in data.load(Options(data=name, eval_data=name)).notes
    )
    assert not any("WARNING" in note for note in data.load(Options(data=name)).notes)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcd")), min_size=1), st.integers(0, 30))
def test_holding_out_never_takes_a_labels_last_text(pairs: list[tuple[str, str]], count: int) -> None:
    rest, held = data.split(pairs, min(count, len(pairs) - 1), keep=True)
    assert {label for _, label in rest} == {label for _, label in pairs}
    assert not {text for text, _ in rest} & {text for text, _ in held}
    texts = {text for text, _ in held}
    assert sorted(rest + held) == sorted(p for p in pairs if p in held or p[0] not in texts)


def test_rows_whose_text_is_held_out_with_another_label_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", "text,label\n" + "".join(f"t {i},a\nt {i},b\n" for i in range(30)))
    loaded = data.load(Options(data=str(tmp_path / "t.csv")))
    lost = 60 - len(loaded.train) - len(loaded.eval)
    assert lost > 0
    assert loaded.left_out["train"].counts == {"held out under another label": lost}


def test_labels_with_one_text_stay_in_training(tmp_path: Path) -> None:
    common = "".join(f"t {i},{'ab'[i % 2]}\n" for i in range(80))
    write(tmp_path / "r.csv", "text,label\n" + common + "".join(f"r {i},rare{i}\n" for i in range(8)))
    loaded = data.load(Options(data=str(tmp_path / "r.csv")))
    assert len(loaded.labels) == 10
    assert set(loaded.train.targets) == set(range(10))
    assert len(loaded.eval) >= 14
