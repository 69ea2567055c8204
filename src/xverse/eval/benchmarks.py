"""The prompts of the benchmarks, each as its authors' script writes them."""

from __future__ import annotations

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
    split="test",
    splits=("test", "val"),
    load=mmlu.subjects,
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
CEVAL = Benchmark(
    name="ceval",
    title="C-Eval",
    folder="ceval",
    split="val",
    splits=("val", "test"),
    load=ceval.subjects,
    header=lambda subject: f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n\n",
    item=lambda question: f"{question.text}{lettered(question)}\n答案：",
    answer=lambda question, letter: letter,
    between="\n\n",
    average="macro",
    categories=("STEM", "Social Science", "Humanities", "Other"),
    shots_rule="the five questions of the dev set",
    method='tokens of "A" to "D"; the val set, as the answers of the test set are not public',
    source="https://cevalbenchmark.com",
)
AGIEVAL = Benchmark(
    name="agieval",
    title="AGIEval",
    folder="agieval",
    split="v1",
    splits=("v1",),
    load=agieval.subjects,
    header=_agieval_header,
    item=_agieval_item,
    answer=lambda question, letter: f" {letter}" if _english(question) else letter,
    between="\n\n",
    average="micro",
    categories=("English", "Chinese"),
    shots_rule=SHOTS_TAKEN_OUT,
    method='English tasks as MMLU, Chinese ones as C-Eval, tokens of " A" or "A"; questions with one answer',
    source="https://github.com/ruixiangcui/AGIEval",
)
GAOKAO_BENCH = Benchmark(
    name="gaokao-bench",
    title="GAOKAO-Bench",
    folder="gaokao-bench",
    split="2010-2022",
    splits=("2010-2022",),
    load=gaokao_bench.subjects,
    header=lambda subject: f"以下是中国高考{subject.title}考试的单项选择题，请选出其中的正确答案。\n\n",
    item=_gaokao_item,
    answer=lambda question, letter: letter,
    between="\n\n",
    average="micro",
    categories=("语文", "英语", "数学", "理综", "文综"),
    shots_rule=SHOTS_TAKEN_OUT,
    method='tokens of "A" to "D" (to "G" where there are so many options); sub-questions with one answer',
    source="https://github.com/OpenLMLab/GAOKAO-Bench",
)
GAOKAO_ENGLISH = Benchmark(
    name="gaokao-english",
    title="GAOKAO-English",
    folder="gaokao-bench",
    split="2018-2021",
    splits=("2018-2021",),
    load=gaokao_english.subjects,
    header=lambda subject: f"以下是中国高考英语{subject.title}的单项选择题，请选出其中的正确答案。\n\n",
    item=_gaokao_item,
    answer=lambda question, letter: letter,
    between="\n\n",
    average="micro",
    categories=tuple(title for _, title, _, _ in gaokao_english.KINDS),
    shots_rule=SHOTS_TAKEN_OUT,
    method='tokens of "A" to "D" (to "G" where there are so many options)',
    source="https://github.com/ExpressAI/AI-Gaokao",
)

BENCHMARKS = {one.name: one for one in (MMLU, CEVAL, AGIEVAL, GAOKAO_BENCH, GAOKAO_ENGLISH)}
