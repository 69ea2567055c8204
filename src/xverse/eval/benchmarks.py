"""The prompts of the benchmarks, each as its authors' script writes them."""

from __future__ import annotations

from dataclasses import replace

from xverse.data.benchmarks import agieval, ceval, gaokao_bench, gaokao_english, mmlu
from xverse.data.benchmarks.questions import SHOTS_TAKEN_OUT, Question, Subject
from xverse.eval.benchmark import Benchmark, lettered


def _english(question: Question) -> bool:
    return agieval.TASKS[question.id.partition("/")[0]][1] == "en"


def _agieval_header(subject: Subject) -> str:
    if subject.category == "English":
        return f"The following are multiple choice questions (with answers) about {subject.title}.\n\n"
    return f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n\n"


def _agieval_item(question: Question) -> str:
    passage = f"{question.passage.strip()}\n" if question.passage.strip() else ""
    end = "Answer:" if _english(question) else "答案："
    return f"{passage}{question.text.strip()}{lettered(question)}\n{end}"


def _gaokao_item(question: Question) -> str:
    passage = f"{question.passage}\n" if question.passage else ""
    options = f"\n选项：{lettered(question)}" if question.options else ""
    return f"{passage}{question.text}{options}\n答案："


MMLU = Benchmark(
    name="mmlu",
    title="MMLU",
    folder="mmlu",
    splits=("test", "val"),
    load=mmlu.subjects,
    header=lambda subject: (  # two blanks: the authors join an empty word
        f"The following are multiple choice questions (with answers) about  {subject.title}.\n\n"
    ),
    item=lambda question: f"{question.text}{lettered(question)}\nAnswer:",
    answer=lambda question, letter: f" {letter}",
    average="micro",
    shots_rule="the first five questions of the dev set",
    method='tokens of " A" to " D"',
)
CEVAL = Benchmark(
    name="ceval",
    title="C-Eval",
    folder="ceval",
    splits=("val", "test"),
    load=ceval.subjects,
    header=lambda subject: f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n\n",
    item=lambda question: f"{question.text}{lettered(question)}\n答案：",
    answer=lambda question, letter: letter,
    average="macro",
    shots_rule="the five questions of the dev set",
    method='tokens of "A" to "D"; the val set, as the answers of the test set are not public',
)
AGIEVAL = Benchmark(
    name="agieval",
    title="AGIEval",
    folder="agieval",
    splits=("v1",),
    load=agieval.subjects,
    header=_agieval_header,
    item=_agieval_item,
    answer=lambda question, letter: f" {letter}" if _english(question) else letter,
    average="micro",
    shots_rule=SHOTS_TAKEN_OUT,
    method='English tasks as MMLU, Chinese ones as C-Eval, tokens of " A" or "A"; questions with one answer',
)
GAOKAO_BENCH = Benchmark(
    name="gaokao-bench",
    title="GAOKAO-Bench",
    folder="gaokao-bench",
    splits=("2010-2022",),
    load=gaokao_bench.subjects,
    header=lambda subject: f"以下是中国高考{subject.title}考试的单项选择题，请选出其中的正确答案。\n\n",
    item=_gaokao_item,
    answer=lambda question, letter: letter,
    average="micro",
    shots_rule=SHOTS_TAKEN_OUT,
    method='tokens of "A" to "D" (to "G" where there are so many options); sub-questions with one answer',
)
GAOKAO_ENGLISH = replace(
    GAOKAO_BENCH,
    name="gaokao-english",
    title="GAOKAO-English",
    splits=("2018-2021",),
    load=gaokao_english.subjects,
    header=lambda subject: f"以下是中国高考英语{subject.title}的单项选择题，请选出其中的正确答案。\n\n",
    method='tokens of "A" to "D" (to "G" where there are so many options)',
)

BENCHMARKS = {one.name: one for one in (MMLU, CEVAL, AGIEVAL, GAOKAO_BENCH, GAOKAO_ENGLISH)}
