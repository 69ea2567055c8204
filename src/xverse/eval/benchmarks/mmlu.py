"""MMLU (Hendrycks et al., arXiv:2009.03300), exactly as the authors' script asks it."""

from __future__ import annotations

from pathlib import Path

from xverse.config import UserError
from xverse.data.benchmarks.questions import Question, Reader, Subject
from xverse.eval.benchmark import Benchmark, Options, lettered

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


def load(folder: Path, reader: Reader, options: Options) -> list[Subject]:
    split = options.split or "test"
    if not (folder / "data" / split).is_dir():
        raise UserError(f"{folder / 'data' / split}: no such folder; `xverse eval fetch mmlu` gets MMLU")
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


def _questions(folder: Path, split: str, name: str, reader: Reader, options: Options) -> list[Question]:
    found = []
    path = folder / "data" / split / f"{name}_{split}.csv"
    for number, (where, row) in enumerate(reader.rows(path, None)):
        if len(row) != 6:
            reader.refuse(where, f"{len(row)} columns, expected 6")
            continue
        text, *choices, answer = row
        if not options.fix_none:
            choices = ["nan" if choice in _MISSING else choice for choice in choices]
        question = reader.question(where, text, choices, answer, id=f"{name}/{number}")
        if question is not None:
            found.append(question)
    return found


BENCHMARK = Benchmark(
    name="mmlu",
    title="MMLU",
    folder="mmlu",
    split="test",
    splits=("test", "val"),
    load=load,
    header=lambda subject: (  # two blanks: the authors join an empty word
        f"The following are multiple choice questions (with answers) about  {subject.title}.\n\n"
    ),
    item=lambda question: f"{question.text}{lettered(question)}\nAnswer:",
    answer=lambda question, letter: f" {letter}",
    between="\n\n",
    average="micro",
    categories=("STEM", "humanities", "social sciences", "other"),
    shots_rule="the first five questions of the dev set",
    method='tokens of " A" to " D"',
    source="https://github.com/hendrycks/test",
)
