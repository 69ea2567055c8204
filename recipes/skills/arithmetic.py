"""Sums, differences, products and word problems, with the steps that lead to the answer.

Numbers above 20 are added and subtracted column by column from the units, as on paper: each step needs two
digits and a carry, which a small model can learn, where the whole sum at once is a table of a million entries.
"""

from __future__ import annotations

from recipes.skills.common import PEOPLE, Dialogue, Skill, Writer

DIRECT = 20  # numbers up to here are added without steps

ADD = {
    "zh": ["{a}+{b}等于多少？", "{a}加{b}等于几？", "{a}+{b}=?", "计算{a}+{b}", "请算一下{a}加{b}", "{a} + {b}",
           "{a}加{b}是多少？", "算算{a}+{b}", "{a}与{b}的和是多少？", "{a}+{b}=", "帮我算{a}+{b}。", "求{a}加{b}。",
           "{a}+{b}是多少？", "{a}加上{b}得多少？", "请计算：{a}+{b}"],
    "en": ["What is {a}+{b}?", "{a} + {b}", "{a}+{b}=", "Calculate {a} + {b}.", "How much is {a} plus {b}?",
           "Add {a} and {b}.", "{a} plus {b}", "What's the sum of {a} and {b}?", "Work out {a}+{b}.",
           "Please compute {a}+{b}.", "Can you add {a} and {b}?", "What is {a} plus {b}?", "{a}+{b}=?",
           "What does {a} + {b} equal?", "How much is {a}+{b}?"],
    "ru": ["Сколько будет {a}+{b}?", "Сколько будет {a} плюс {b}?"],
    "fr": ["Combien font {a}+{b} ?", "Combien font {a} plus {b} ?"],
    "de": ["Wie viel ist {a}+{b}?", "Was ist {a} plus {b}?"],
    "es": ["¿Cuánto es {a}+{b}?", "¿Cuánto es {a} más {b}?"],
    "ja": ["{a}+{b}はいくつですか？", "{a}足す{b}は？"],
}  # fmt: skip
SUBTRACT = {
    "zh": ["{a}-{b}等于多少？", "{a}减{b}等于几？", "{a}-{b}=?", "计算{a}-{b}", "请算一下{a}减{b}", "{a} - {b}",
           "{a}减{b}是多少？", "算算{a}-{b}", "{a}比{b}多多少？", "{a}-{b}=", "帮我算{a}-{b}。", "{a}减去{b}得多少？"],
    "en": ["What is {a}-{b}?", "{a} - {b}", "{a}-{b}=", "Calculate {a} - {b}.", "How much is {a} minus {b}?",
           "Subtract {b} from {a}.", "{a} minus {b}", "What's the difference between {a} and {b}?",
           "Work out {a}-{b}.", "What is {a} minus {b}?", "Take {b} away from {a}.", "How much is {a}-{b}?"],
}  # fmt: skip
MULTIPLY = {
    "zh": ["{a}×{b}等于多少？", "{a}乘{b}等于几？", "{a}乘以{b}是多少？", "计算{a}×{b}", "{a}*{b}=", "{a}*{b}等于多少",
           "算一下{a}乘{b}", "{a}×{b}=?", "{a}和{b}的积是多少？", "帮我算{a}乘以{b}。"],
    "en": ["What is {a} times {b}?", "{a}*{b}=", "Calculate {a} × {b}.", "How much is {a} times {b}?",
           "Multiply {a} by {b}.", "{a} x {b}", "What is {a}*{b}?", "{a} times {b}", "Work out {a} × {b}.",
           "What's the product of {a} and {b}?"],
}  # fmt: skip
DIVIDE = {
    "zh": ["{a}÷{b}等于多少？", "{a}除以{b}等于几？", "计算{a}÷{b}", "{a}除以{b}是多少？", "{a}/{b}="],
    "en": ["What is {a} divided by {b}?", "{a}/{b}=", "Calculate {a} ÷ {b}.", "Divide {a} by {b}.",
           "How much is {a} divided by {b}?"],
}  # fmt: skip


def column_sum(a: int, b: int) -> list[str]:
    """``27+58``: 7+8=15, 2+5+1=8."""
    steps, carry = [], 0
    while a or b:
        a, x = divmod(a, 10)
        b, y = divmod(b, 10)
        steps.append(f"{x}+{y}{'+1' if carry else ''}={x + y + carry}")
        carry = (x + y + carry) // 10
    return steps


def column_difference(a: int, b: int) -> list[str]:
    """``73-28``: 13-8=5, 7-2-1=4; a step borrows ten where its digit is too small."""
    assert a >= b
    steps, borrow = [], 0
    while a:
        a, x = divmod(a, 10)
        b, y = divmod(b, 10)
        tens = 10 if x - y - borrow < 0 else 0
        steps.append(f"{x + tens}-{y}{'-1' if borrow else ''}={x + tens - y - borrow}")
        borrow = tens // 10
    return steps


def steps_of(sign: str, a: int, b: int, language: str) -> str:
    """The calculation as a clause that ends in the result, without a final mark."""
    result = {"+": a + b, "-": a - b, "×": a * b, "÷": a // b if b else 0}[sign]
    comma = "，" if language == "zh" else ", "
    if sign in "+-" and max(a, b) > DIRECT:
        steps = column_sum(a, b) if sign == "+" else column_difference(a, b)
        return comma.join([*steps, f"{a}{sign}{b}={result}"])
    if sign == "×" and a > 10:
        tens = a // 10 * 10
        middle = f"={tens}×{b}+{a - tens}×{b}={tens * b}+{(a - tens) * b}" if a > tens else ""
        return f"{a}×{b}{middle}={result}"
    return f"{a}{sign}{b}={result}"


def _end(text: str, language: str) -> str:
    return text + ("。" if language in ("zh", "ja") else ".")


def _pair(writer: Writer, low: int, high: int) -> tuple[int, int]:
    """Two numbers. Small sums are a table that has to be learnt whole: only their phrasing is held out."""
    if high <= DIRECT:
        return writer.number(low, high), writer.number(low, high)
    a, b = writer.filler(lambda: tuple(sorted((writer.number(low, high), writer.number(low, high)))))
    return (a, b) if writer.chance(0.5) else (b, a)


def _range(writer: Writer) -> tuple[int, int]:
    return writer.one([(0, 20), (10, 99), (10, 99), (100, 999), (2, 999)])


def add(writer: Writer, language: str) -> Dialogue:
    a, b = _pair(writer, *_range(writer))
    question = writer.ask(ADD[language], a=a, b=b)
    return Dialogue((question, _end(steps_of("+", a, b, language), language)), {"number": str(a + b)})


def subtract(writer: Writer, language: str) -> Dialogue:
    a, b = sorted(_pair(writer, *_range(writer)), reverse=True)
    question = writer.ask(SUBTRACT[language], a=a, b=b)
    return Dialogue((question, _end(steps_of("-", a, b, language), language)), {"number": str(a - b)})


def multiply(writer: Writer, language: str) -> Dialogue:
    if writer.chance(0.6):
        a, b = writer.filler(lambda: (writer.number(11, 99), writer.number(2, 9)))
    else:  # the table itself has to be learnt whole; the phrasing is held out
        a, b = writer.number(1, 10), writer.number(1, 10)
    question = writer.ask(MULTIPLY[language], a=a, b=b)
    return Dialogue((question, _end(steps_of("×", a, b, language), language)), {"number": str(a * b)})


def divide(writer: Writer, language: str) -> Dialogue:
    b, result = writer.number(2, 9), writer.number(1, 10)
    question = writer.ask(DIVIDE[language], a=b * result, b=b)
    answer = _end(steps_of("÷", b * result, b, language), language)
    return Dialogue((question, answer), {"number": str(result)})


THINGS = {
    "zh": [("苹果", "个"), ("本子", "个"), ("铅笔", "支"), ("糖", "颗"), ("贴纸", "张"), ("气球", "个"), ("鸡蛋", "个"),
           ("书", "本"), ("邮票", "张"), ("橘子", "个"), ("球", "个"), ("花", "朵")],
    "en": ["apples", "pencils", "books", "stamps", "balloons", "eggs", "oranges", "marbles", "cards", "flowers",
           "cookies", "toys"],
}  # fmt: skip
# (question, sign, answer); {n} is the result
STORIES = {
    "zh": [
        ("{who}有{a}{m}{thing}，妈妈又给了他{b}{m}，现在一共有多少{m}？", "+", "{who}现在一共有{n}{m}{thing}。"),
        ("{who}有{a}{m}{thing}，又买了{b}{m}。{who}现在有多少{m}{thing}？", "+", "{who}现在有{n}{m}{thing}。"),
        ("{who}有{a}{m}{thing}，{other}有{b}{m}，两人一共有多少{m}？", "+", "两人一共有{n}{m}{thing}。"),
        ("{who}有{a}{m}{thing}，送给{other}{b}{m}，还剩多少{m}？", "-", "{who}还剩{n}{m}{thing}。"),
        ("盒子里有{a}{m}{thing}，拿走了{b}{m}，盒子里还有几{m}？", "-", "盒子里还有{n}{m}{thing}。"),
        ("{who}有{a}{m}{thing}，用掉了{b}{m}，还有多少{m}？", "-", "{who}还有{n}{m}{thing}。"),
        ("每个盒子里有{b}{m}{thing}，{a}个盒子里一共有多少{m}？", "×", "一共有{n}{m}{thing}。"),
        ("{who}每天买{b}{m}{thing}，{a}天一共买多少{m}？", "×", "{who}一共买{n}{m}{thing}。"),
        ("有{a}个小朋友，每人分到{b}{m}{thing}，一共要多少{m}？", "×", "一共要{n}{m}{thing}。"),
        ("把{a}{m}{thing}平均分给{b}个小朋友，每人分到几{m}？", "÷", "每人分到{n}{m}{thing}。"),
        ("{who}有{a}{m}{thing}，每{b}{m}装一袋，可以装几袋？", "÷", "可以装{n}袋。"),
    ],
    "en": [
        ("{who} has {a} {thing} and gets {b} more. How many {thing} does {who} have now?", "+",
         "{who} has {n} {thing}."),
        ("{who} has {a} {thing}. {other} has {b} {thing}. How many do they have together?", "+",
         "Together they have {n} {thing}."),
        ("{who} buys {a} {thing} on Monday and {b} on Tuesday. How many {thing} in all?", "+",
         "That is {n} {thing} in all."),
        ("{who} has {a} {thing} and gives {b} to {other}. How many are left?", "-", "{n} {thing} are left."),
        ("There are {a} {thing} in a box. {who} takes {b}. How many remain?", "-", "{n} {thing} remain."),
        ("{who} had {a} {thing} and lost {b}. How many does {who} have now?", "-", "{who} has {n} {thing}."),
        ("A box holds {b} {thing}. How many {thing} are in {a} boxes?", "×", "There are {n} {thing}."),
        ("{who} buys {b} {thing} a day for {a} days. How many {thing} is that?", "×", "That is {n} {thing}."),
        ("Each of {a} children gets {b} {thing}. How many {thing} are needed?", "×", "{n} {thing} are needed."),
        ("{who} shares {a} {thing} equally among {b} friends. How many does each get?", "÷",
         "Each friend gets {n} {thing}."),
        ("{a} {thing} are packed in bags of {b}. How many bags are there?", "÷", "There are {n} bags."),
    ],
}  # fmt: skip
# Two products in a row: so many times so many, each so long.
TWO_STEPS = {
    "zh": [
        ("{who}每天跑{a}圈，每圈{b}米，{c}天一共跑多少米？", "每天跑{a}×{b}={p}米，{c}天跑{p}×{c}={n}米。"),
        ("{who}每周上{a}次课，每次{b}分钟，{c}周一共上课多少分钟？",
         "每周上课{a}×{b}={p}分钟，{c}周上课{p}×{c}={n}分钟。"),
        ("一个书架有{a}层，每层放{b}本书，{c}个书架一共放多少本书？",
         "一个书架放{a}×{b}={p}本，{c}个书架放{p}×{c}={n}本。"),
        ("{who}每次游{a}个来回，每个来回{b}米，{c}次一共游多少米？", "每次游{a}×{b}={p}米，{c}次游{p}×{c}={n}米。"),
        ("一箱有{a}包糖，每包{b}颗，{c}箱一共有多少颗？", "一箱有{a}×{b}={p}颗，{c}箱有{p}×{c}={n}颗。"),
    ],
    "en": [
        ("{who} runs {a} laps of {b} metres a day. How many metres does {who} run in {c} days?",
         "A day: {a}×{b}={p} metres. In {c} days: {p}×{c}={n} metres."),
        ("{who} has {a} lessons of {b} minutes a week. How many minutes is that in {c} weeks?",
         "A week: {a}×{b}={p} minutes. In {c} weeks: {p}×{c}={n} minutes."),
        ("A shelf has {a} rows of {b} books. How many books are on {c} shelves?",
         "A shelf: {a}×{b}={p} books. On {c} shelves: {p}×{c}={n} books."),
        ("A crate holds {a} bags of {b} sweets. How many sweets are in {c} crates?",
         "A crate: {a}×{b}={p} sweets. In {c} crates: {p}×{c}={n} sweets."),
        ("{who} swims {a} lanes of {b} metres each time. How many metres in {c} times?",
         "Each time: {a}×{b}={p} metres. In {c} times: {p}×{c}={n} metres."),
    ],
}  # fmt: skip


def story(writer: Writer, language: str) -> Dialogue:
    """A word problem of one step: its names, things and numbers are fillers, its text is a phrasing."""
    question, sign, answer = writer.one(STORIES[language])
    thing = writer.one(THINGS[language])
    # Names belong to the filler: small numbers alone would leave too few.
    who, other = writer.filler(lambda: (*writer.some(PEOPLE[language], 2), thing, question))[:2]
    if sign in "+-":
        a, b = _pair(writer, 2, writer.one([20, 60]))
        a, b = (max(a, b) + 1, min(a, b)) if sign == "-" else (a, b)
    elif sign == "×":
        a, b = writer.filler(lambda: (writer.number(2, 12), writer.number(2, 9)))
    else:
        b, times = writer.filler(lambda: (writer.number(2, 9), writer.number(2, 9)))
        a = b * times
    name, measure = thing if isinstance(thing, tuple) else (thing, "")
    result = {"+": a + b, "-": a - b, "×": a * b, "÷": a // b}[sign]
    values = {"who": who, "other": other, "a": a, "b": b, "thing": name, "m": measure, "n": result}
    steps = steps_of(sign, a, b, language)
    gap = "。" if language == "zh" else ". "
    return Dialogue(
        (question.format(**values), f"{steps}{gap}{answer.format(**values)}"), {"number": str(result)}
    )


def two_steps(writer: Writer, language: str) -> Dialogue:
    a, b, c = writer.filler(
        lambda: (writer.number(2, 5), writer.one([10, 20, 30, 40, 50, 60, 100, 200]), writer.number(2, 7))
    )
    question, answer = writer.one(TWO_STEPS[language])
    values = {"who": writer.one(PEOPLE[language]), "a": a, "b": b, "c": c, "p": a * b, "n": a * b * c}
    return Dialogue((question.format(**values), answer.format(**values)), {"number": str(a * b * c)})


def foreign(writer: Writer, language: str) -> Dialogue:
    a, b = _pair(writer, 1, writer.one([20, 99]))
    question = writer.ask(ADD[language], a=a, b=b)
    return Dialogue((question, _end(steps_of("+", a, b, language), language)), {"number": str(a + b)})


SKILL = Skill(
    "arithmetic",
    [(4, add), (3, subtract), (2, multiply), (0.7, divide), (3, story), (1.3, two_steps)],
    [(1, foreign, ("ru", "fr", "de", "es", "ja"))],
)
