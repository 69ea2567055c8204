"""MMLU (Hendrycks et al., arXiv:2009.03300)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from xverse.data.benchmarks.questions import (
    Options,
    Question,
    QuestionReader,
    RawQuestion,
    Subject,
    check_folder,
)

NAME, FOLDERS = "mmlu", ("mmlu",)
_CATEGORIES = {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history "
    "high_school_world_history international_law jurisprudence logical_fallacies moral_disputes "
    "moral_scenarios philosophy prehistory professional_law world_religions",
    "social sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging "
    "management marketing medical_genetics miscellaneous nutrition professional_accounting "
    "professional_medicine virology",
}
SUBJECTS = {name: category for category, names in _CATEGORIES.items() for name in names.split()}

# Texts that pandas, with which the authors' script reads the files, takes for a missing value.
_MISSING = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
        *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)


def read(path: Path, name: str, reader: QuestionReader) -> Iterator[RawQuestion]:
    """Every question of a file; their ids begin with ``name``."""
    for number, (where, row) in enumerate(reader.rows(path)):
        cells = dict(enumerate(row))
        yield RawQuestion(
            id=f"{name}/{number}",
            where=where,
            text=cells.get(0, ""),
            options=tuple(row[1:5]),
            answer=cells.get(5),
            problem="" if len(row) == 6 else f"{len(row)} columns, expected 6",
        )


def all_questions(data_dir: Path) -> Iterator[RawQuestion]:
    """Every question of every split, for decontamination."""
    for path in sorted((data_dir / "mmlu").glob("data/*/*.csv")):
        yield from read(path, path.stem, QuestionReader(skip=True))


def subjects(folder: Path, reader: QuestionReader, options: Options) -> list[Subject]:
    """The subjects to score."""
    split = options.split or "test"
    check_folder(folder / "data" / split, NAME, "MMLU")
    return [
        Subject(
            name=name,
            title=name.replace("_", " "),
            category=SUBJECTS[name],
            shots=tuple(_questions(folder, "dev", name, reader, options)[:5]),
            questions=tuple(_questions(folder, split, name, reader, options)),
        )
        for name in sorted(SUBJECTS)
    ]


def _questions(
    folder: Path, split: str, name: str, reader: QuestionReader, options: Options
) -> list[Question]:
    raws = read(folder / "data" / split / f"{name}_{split}.csv", name, reader)
    if not options.fix_none:
        raws = (
            replace(raw, options=tuple("nan" if o in _MISSING else o for o in raw.options)) for raw in raws
        )
    return reader.questions(raws)
