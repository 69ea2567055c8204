"""AGIEval v1 (Zhong et al., arXiv:2304.06364): its multiple-choice questions that have one answer."""

from __future__ import annotations

from pathlib import Path

from xverse.config import UserError
from xverse.data.benchmarks.questions import LETTERS, Question, Reader, Subject
from xverse.eval.benchmark import SHOTS_TAKEN_OUT, Benchmark, Options, first_ones_out, lettered

# Title and language; without JEC-QA (several answers), the two cloze tasks, and the copy of SAT English
# without its passages.
TASKS = {
    "aqua-rat": ("algebra word problems", "en"),
    "gaokao-biology": ("高考生物", "zh"),
    "gaokao-chemistry": ("高考化学", "zh"),
    "gaokao-chinese": ("高考语文", "zh"),
    "gaokao-english": ("高考英语", "zh"),
    "gaokao-geography": ("高考地理", "zh"),
    "gaokao-history": ("高考历史", "zh"),
    "gaokao-mathqa": ("高考数学", "zh"),
    "gaokao-physics": ("高考物理", "zh"),
    "logiqa-en": ("logical reasoning", "en"),
    "logiqa-zh": ("逻辑推理", "zh"),
    "lsat-ar": ("LSAT analytical reasoning", "en"),
    "lsat-lr": ("LSAT logical reasoning", "en"),
    "lsat-rc": ("LSAT reading comprehension", "en"),
    "sat-en": ("SAT English", "en"),
    "sat-math": ("SAT mathematics", "en"),
}


def load(folder: Path, reader: Reader, options: Options) -> list[Subject]:
    if not (folder / "data" / "v1").is_dir():
        raise UserError(f"{folder / 'data' / 'v1'}: no such folder; `xverse eval fetch agieval` gets AGIEval")
    subjects = []
    for name, (title, language) in TASKS.items():
        shots, scored = first_ones_out(_questions(folder / "data" / "v1" / f"{name}.jsonl", name, reader))
        subjects.append(
            Subject(
                name=name,
                title=title,
                category="English" if language == "en" else "Chinese",
                shots=shots,
                questions=scored,
            )
        )
    return subjects


def _questions(path: Path, name: str, reader: Reader) -> list[Question]:
    found = []
    for number, (where, row) in enumerate(reader.objects(path)):
        label, options = row.get("label"), row.get("options")
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            reader.refuse(where, "options: expected a list of texts")
            continue
        if not isinstance(label, str) or len(label) != 1:
            continue  # several answers
        texts = []
        for letter, option in zip(LETTERS, options, strict=False):
            texts.append(option.removeprefix(f"({letter})").strip())
        passage = row.get("passage") or ""
        question = reader.question(
            where, row.get("question"), texts, label, id=f"{name}/{number}", passage=passage
        )
        if question is not None:
            found.append(question)
    return found


def header(subject: Subject) -> str:
    if subject.category == "English":
        return f"The following are multiple choice questions (with answers) about {subject.title}.\n\n"
    return f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n\n"


def item(question: Question) -> str:
    passage = f"{question.passage.strip()}\n" if question.passage.strip() else ""
    end = "Answer:" if _english(question) else "答案："
    return f"{passage}{question.text.strip()}{lettered(question)}\n{end}"


def _english(question: Question) -> bool:
    return TASKS[question.id.partition("/")[0]][1] == "en"


BENCHMARK = Benchmark(
    name="agieval",
    title="AGIEval",
    folder="agieval",
    split="v1",
    splits=("v1",),
    load=load,
    header=header,
    item=item,
    answer=lambda question, letter: f" {letter}" if _english(question) else letter,
    between="\n\n",
    average="micro",
    categories=("English", "Chinese"),
    shots_rule=SHOTS_TAKEN_OUT,
    method='English tasks as MMLU, Chinese ones as C-Eval, tokens of " A" or "A"; questions with one answer',
    source="https://github.com/ruixiangcui/AGIEval",
)
