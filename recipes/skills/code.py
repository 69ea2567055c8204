"""Programs with an explanation, and small functions with a number of the user's. Each program is run before
it is taken."""

from __future__ import annotations

import contextlib
import functools
import io

from recipes.skills.common import Dialogue, Skill, Writer
from recipes.skills.programs import PROGRAMS
from xverse.eval.replies import with_test

ASK = {
    "zh": ["写一个{name}", "用Python写{name}", "请写{name}。", "用Python实现{name}", "帮我写一个{name}",
           "{name}怎么写？", "给我{name}的代码", "能写一个{name}吗？", "我想要{name}的Python代码", "请用Python编写{name}。",
           "怎样用Python实现{name}？", "编写{name}", "写出{name}的代码", "{name}，用Python", "来一段{name}的代码"],
    "en": ["Write {name}.", "Write {name} in Python.", "Show me {name} in Python.", "Implement {name}.",
           "Please write {name}.", "Can you write {name}?", "How do I write {name}?", "Code {name}.",
           "I need {name} in Python.", "Give me Python code for {name}.", "Write code for {name}.",
           "How would you implement {name} in Python?", "Could you code {name}?", "Python code for {name}",
           "Program {name} in Python."],
}  # fmt: skip
LEAD = {
    "zh": ["这是Python代码：", "代码如下：", "可以这样写："],
    "en": ["Here is the code:", "Here is a Python version:", "You can write it like this:"],
}
# (request, code, test, explanation): {k} is the user's number
FUNCTIONS = {
    "zh": [
        ("写一个函数，返回x加{k}", "def add(x):\n    return x + {k}", "assert f(1) == 1 + {k}", "它返回x加{k}。"),
        ("写一个函数，返回x乘以{k}", "def times(x):\n    return x * {k}", "assert f(3) == 3 * {k}",
         "它返回x乘以{k}。"),
        ("写一个函数，返回x减{k}", "def minus(x):\n    return x - {k}", "assert f(3) == 3 - {k}", "它返回x减{k}。"),
        ("写一个函数，判断x是否大于{k}", "def larger(x):\n    return x > {k}",
         "assert f({k} + 1) and not f({k})", "x大于{k}时返回True。"),
        ("写一个函数，判断x能否被{k}整除", "def divides(x):\n    return x % {k} == 0",
         "assert f({k} * 3) and not f({k} * 3 + 1)", "余数是0就能整除。"),
        ("写一个函数，返回从1到{k}的列表", "def numbers():\n    return list(range(1, {k} + 1))",
         "assert f()[-1] == {k} and len(f()) == {k}", "range不含最后一个数，所以要加1。"),
        ("写一个函数，取出列表中大于{k}的数", "def keep(a):\n    return [x for x in a if x > {k}]",
         "assert f([{k}, {k} + 1]) == [{k} + 1]", "列表推导式只保留大于{k}的数。"),
        ("写一个函数，求列表前{k}个数的和", "def first_sum(a):\n    return sum(a[:{k}])",
         "assert f([1] * 200) == {k}", "a[:{k}]是前{k}个数。"),
    ],
    "en": [
        ("a function that returns x plus {k}", "def add(x):\n    return x + {k}", "assert f(1) == 1 + {k}",
         "It returns x plus {k}."),
        ("a function that returns x times {k}", "def times(x):\n    return x * {k}", "assert f(3) == 3 * {k}",
         "It returns x times {k}."),
        ("a function that returns x minus {k}", "def minus(x):\n    return x - {k}", "assert f(3) == 3 - {k}",
         "It returns x minus {k}."),
        ("a function that checks whether x is larger than {k}", "def larger(x):\n    return x > {k}",
         "assert f({k} + 1) and not f({k})", "It returns True if x is larger than {k}."),
        ("a function that checks whether x is divisible by {k}", "def divides(x):\n    return x % {k} == 0",
         "assert f({k} * 3) and not f({k} * 3 + 1)", "The remainder has to be 0."),
        ("a function that returns the numbers from 1 to {k}", "def numbers():\n    return list(range(1, {k} + 1))",
         "assert f()[-1] == {k} and len(f()) == {k}", "range leaves out its end, so we add 1."),
        ("a function that keeps the numbers above {k}", "def keep(a):\n    return [x for x in a if x > {k}]",
         "assert f([{k}, {k} + 1]) == [{k} + 1]", "The list comprehension keeps numbers above {k}."),
        ("a function that sums the first {k} numbers of a list", "def first_sum(a):\n    return sum(a[:{k}])",
         "assert f([1] * 200) == {k}", "a[:{k}] holds the first {k} numbers."),
    ],
}  # fmt: skip
PREFIX = {
    "zh": ["{ask}", "请{ask}。", "用Python{ask}", "帮我{ask}。", "请用Python{ask}。", "能不能{ask}？", "{ask}。"],
    "en": ["Write {ask}.", "Please write {ask}.", "Write {ask} in Python.", "I need {ask}.", "Can you write {ask}?",
           "Give me {ask}.", "Python: {ask}"],
}  # fmt: skip


@functools.cache
def works(code: str, test: str) -> bool:
    """Whether one of our own programs runs and passes its test."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(with_test(code, test), "program", "exec"), {"__name__": "__main__"})
    except Exception:
        return False
    return True


def _reply(writer: Writer, language: str, code: str, why: str) -> str:
    return f"{writer.say(LEAD[language])}\n```python\n{code}\n```\n{why}"


def program(writer: Writer, language: str) -> Dialogue:
    chosen = writer.one(PROGRAMS)
    assert works(chosen.code, chosen.test), chosen.code
    names, why = (chosen.zh, chosen.why_zh) if language == "zh" else (chosen.en, chosen.why_en)
    name = writer.one(names)
    question = writer.ask(ASK[language], name=name).replace("一个一", "一")
    check = {"program": chosen.test or "pass"}
    return Dialogue((question, _reply(writer, language, chosen.code, why)), check)


def function(writer: Writer, language: str) -> Dialogue:
    ask, code, test, why = writer.one(FUNCTIONS[language])
    k = writer.filler(lambda: writer.number(2, 99))
    code, test = code.replace("{k}", str(k)), test.replace("{k}", str(k))
    assert works(code, test), code
    question = writer.ask(PREFIX[language], ask=ask.format(k=k))
    return Dialogue((question, _reply(writer, language, code, why.format(k=k))), {"program": test})


SKILL = Skill("code", [(3, program), (1, function)])
