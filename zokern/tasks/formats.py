"""The forms in which the benchmarks publish their data, and the hub has it, as rows of a table.

Each function takes one object, a line of a file, a whole file or a row of the hub, and yields its rows. A class is written
by its name, and "" where it is not told. They raise ValueError that says what an object lacks.

Sources: GLUE (Wang et al. 2018), SuperGLUE (Wang et al. 2019), SQuAD (Rajpurkar et al. 2016), DROP (Dua et al. 2019).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Given = Mapping[str, Any]
TRUTH = ("False", "True")
CLASSES = {"rte": ("entailment", "not_entailment"), "cb": ("entailment", "contradiction", "neutral")}


def sst2(given: Given) -> Iterator[Row]:
    """sentence, label (0 is negative)."""
    yield {"sentence": _get(given, "sentence"), "label": _class(given, ("negative", "positive"))}


def entailment(task: str) -> Callable[[Given], Iterator[Row]]:
    """premise, hypothesis, label: of rte and cb."""

    def rows(given: Given) -> Iterator[Row]:
        yield {name: _get(given, name) for name in ("premise", "hypothesis")} | {"label": _class(given, CLASSES[task])}

    return rows


def boolq(given: Given) -> Iterator[Row]:
    """passage, question, label."""
    yield {
        "passage": _get(given, "passage"),
        "question": str(_get(given, "question")).rstrip("? "),
        "label": _class(given, TRUTH),
    }


def wsc(given: Given) -> Iterator[Row]:
    """text, label; span1_text, span2_text and span2_index (of words), in SuperGLUE's own files inside `target`.

    The pronoun is marked as *it* where its index says, since the same word may stand in a text twice.
    """
    spans = given["target"] if isinstance(given.get("target"), Mapping) else given
    name, pronoun = str(_get(spans, "span1_text")), str(_get(spans, "span2_text"))
    words, place = str(_get(given, "text")).split(" "), int(_get(spans, "span2_index"))
    if place < len(words) and words[place].strip(string.punctuation) == pronoun:
        words[place] = words[place].replace(pronoun, f"*{pronoun}*", 1)
        pronoun = f"*{pronoun}*"
    yield {"text": " ".join(words), "pronoun": pronoun, "name": name, "label": _class(given, TRUTH)}


def wic(given: Given) -> Iterator[Row]:
    """word, sentence1, sentence2, label."""
    word, first, second = (str(_get(given, name)) for name in ("word", "sentence1", "sentence2"))
    yield {
        "word": word, "sentence1": first, "sentence2": second, "other": f"{second} {word}", "label": _class(given, TRUTH),
    }  # fmt: skip


def multirc(given: Given) -> Iterator[Row]:
    """paragraph, question, answer, label; SuperGLUE's own files have a passage with questions, which have answers."""
    if "paragraph" in given:
        yield _claim(given["paragraph"], given, "answer", given)
        return
    passage = _get(given, "passage")
    for question in _get(passage, "questions"):
        for answer in _get(question, "answers"):
            yield _claim(_get(passage, "text"), question, "text", answer)


def _claim(paragraph: str, question: Given, name: str, answer: Given) -> Row:
    asked, said = str(_get(question, "question")), str(_get(answer, name))
    return {"paragraph": paragraph, "question": asked, "answer": said, "claim": f"{asked} {said}",
            "label": _class(answer, TRUTH)}  # fmt: skip


def copa(given: Given) -> Iterator[Row]:
    """premise, choice1, choice2, question (cause or effect), label (0 or 1)."""
    links = {"cause": "because", "effect": "so"}
    asked = _get(given, "question")
    if asked not in links:
        raise ValueError(f"'question' is {asked!r}; it is cause or effect")
    label = given.get("label", "")
    yield {
        "premise": str(_get(given, "premise")).strip().rstrip("."), "link": links[asked],
        **{name: _inside(str(_get(given, name))) for name in ("choice1", "choice2")},
        "label": "" if label in (-1, "", None) else label,
    }  # fmt: skip


def _inside(sentence: str) -> str:
    """A sentence as it goes on after another: with a small letter, but for I."""
    first = sentence.partition(" ")[0]
    return sentence if first == "I" or first.startswith("I'") else sentence[:1].lower() + sentence[1:]


def record(given: Given) -> Iterator[Row]:
    """passage, query, entities, answers (lists of texts); SuperGLUE's own files have passage.text with entities as places
    in it (the end is the last character's), and qas with query and answers.
    """
    if "entities" in given:
        yield _cloze(_get(given, "passage"), given["entities"], _get(given, "query"), given.get("answers") or ())
        return
    for part in given["data"] if isinstance(given.get("data"), list) else [given]:
        passage = _get(part, "passage")
        text = _get(passage, "text")
        names = [text[_get(entity, "start") : _get(entity, "end") + 1] for entity in _get(passage, "entities")]
        for asked in _get(part, "qas"):
            right = [_get(answer, "text") for answer in asked.get("answers") or ()]
            yield _cloze(text, names, _get(asked, "query"), right)


def _cloze(passage: str, names: Sequence[str], query: str, right: Sequence[str]) -> Row:
    entities = list(dict.fromkeys(name.strip() for name in names))
    known = [name.strip() for name in right if name.strip() in entities]
    return {"passage": passage.replace("@highlight\n", "- "), "query": query, "entities": entities,
            "label": list(dict.fromkeys(known))}  # fmt: skip


def squad(given: Given) -> Iterator[Row]:
    """context, question, answers; SQuAD's own file has data, paragraphs, context and qas. Questions without an answer, as
    the second version has, have an empty list.
    """
    if "context" in given and "qas" not in given:
        answers = _get(given, "answers")
        texts = answers["text"] if isinstance(answers, Mapping) else [_get(answer, "text") for answer in answers]
        yield {"context": given["context"], "question": _get(given, "question"), "answers": _unique(texts)}
        return
    for article in _get(given, "data"):
        for paragraph in _get(article, "paragraphs"):
            for asked in _get(paragraph, "qas"):
                texts = [_get(answer, "text") for answer in asked.get("answers") or ()]
                yield {"context": _get(paragraph, "context"), "question": _get(asked, "question"),
                       "answers": _unique(texts)}  # fmt: skip


def drop(given: Given) -> Iterator[Row]:
    """passage, question, answers_spans.spans; DROP's own file has passages by their name, with qa_pairs.

    A number, a date or spans, joined by commas, are one answer; so are those of the validators. The hub has spans alone,
    each of which counts as an answer there.
    """
    if "answers_spans" in given:
        yield {"passage": _get(given, "passage"), "question": _get(given, "question"),
               "answers": _unique(_get(given["answers_spans"], "spans"))}  # fmt: skip
        return
    for part in [given] if "qa_pairs" in given else given.values():
        for asked in _get(part, "qa_pairs"):
            found = [_counted(one) for one in (asked.get("answer") or {}, *(asked.get("validated_answers") or ()))]
            yield {"passage": _get(part, "passage"), "question": _get(asked, "question"), "answers": _unique(found)}


def _counted(answer: Given) -> str:
    date = answer.get("date") or {}
    day = " ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part))
    return str(answer.get("number") or "") or day or ", ".join(answer.get("spans") or ())


# ---------------------------------------------------------------------------------------------------------------- parts


def _get(given: Any, name: str) -> Any:
    if not isinstance(given, Mapping):
        raise ValueError(f"an object with {name!r} is needed, this is {str(given)[:60]!r}")
    if name not in given:
        raise ValueError(f"it has no {name!r}, but {', '.join(map(repr, list(given)[:8]))}")
    return given[name]


def _class(given: Given, names: Sequence[str]) -> str:
    """The class's name, of a number, a truth value or a name; "" where there is none, or -1, as in a test set."""
    label = given.get("label")
    if isinstance(label, str) and label.strip().lstrip("-").isdecimal():
        label = int(label)
    if label is None or label in (-1, ""):
        return ""
    if isinstance(label, str):
        wanted = {name.lower(): name for name in names}.get(label.strip().lower())
        if wanted is not None:
            return wanted
    elif isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    raise ValueError(f"'label' is {label!r}; the classes are {', '.join(names)}")


def _unique(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))
