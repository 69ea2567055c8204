"""GAOKAO-English: the multiple-choice questions of AI-Gaokao's ten English papers of 2018 to 2021 (Yuan and
Liu, arXiv:2206.11147), without listening. GAOKAO-Bench holds these papers: its copy is the one that is read.
"""

from __future__ import annotations

from pathlib import Path

from xverse.data.benchmarks.questions import Reader, Subject
from xverse.eval.benchmark import SHOTS_TAKEN_OUT, Benchmark, Options, first_ones_out
from xverse.eval.benchmarks.gaokao_bench import examples, item, questions

# Kind, title, file of GAOKAO-Bench, the papers' places in it (the second one of 2018 is not among them).
KINDS = (
    (
        "reading-multiple-choice",
        "阅读理解",
        "2010-2022_English_Reading_Comp",
        (*range(72, 76), *range(80, 116)),
    ),
    ("reading-cloze", "七选五", "2012-2022_English_Cloze_Test", (13, *range(15, 24))),
    ("cloze-multiple-choice", "完形填空", "2010-2022_English_Fill_in_Blanks", (17, *range(19, 28))),
)


def load(folder: Path, reader: Reader, options: Options) -> list[Subject]:
    subjects = []
    for name, title, file, places in KINDS:
        rows = examples(folder, file)
        chosen = [rows[place] for place in places if place < len(rows)]
        shots, scored = first_ones_out(questions(chosen, name, reader))
        subjects.append(Subject(name=name, title=title, category=title, shots=shots, questions=scored))
    return subjects


BENCHMARK = Benchmark(
    name="gaokao-english",
    title="GAOKAO-English",
    folder="gaokao-bench",
    split="2018-2021",
    splits=("2018-2021",),
    load=load,
    header=lambda subject: f"以下是中国高考英语{subject.title}的单项选择题，请选出其中的正确答案。\n\n",
    item=item,
    answer=lambda question, letter: letter,
    between="\n\n",
    average="micro",
    categories=tuple(title for _, title, _, _ in KINDS),
    shots_rule=SHOTS_TAKEN_OUT,
    method='tokens of "A" to "D" (to "G" where there are so many options)',
    source="https://github.com/ExpressAI/AI-Gaokao",
)
