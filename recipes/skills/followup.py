"""Conversations of two or three turns whose later questions refer to what was said before."""

from __future__ import annotations

from recipes.skills import arithmetic, facts, knowledge
from recipes.skills.common import PEOPLE, Dialogue, Skill, Writer

# zh, en, first and last year in office; party
PRESIDENTS = [
    ("富兰克林·罗斯福", "Franklin Roosevelt", 1933, 1945, "民主党", "Democratic"),
    ("哈里·杜鲁门", "Harry Truman", 1945, 1953, "民主党", "Democratic"),
    ("德怀特·艾森豪威尔", "Dwight Eisenhower", 1953, 1961, "共和党", "Republican"),
    ("约翰·肯尼迪", "John Kennedy", 1961, 1963, "民主党", "Democratic"),
    ("林登·约翰逊", "Lyndon Johnson", 1963, 1969, "民主党", "Democratic"),
    ("理查德·尼克松", "Richard Nixon", 1969, 1974, "共和党", "Republican"),
    ("吉米·卡特", "Jimmy Carter", 1977, 1981, "民主党", "Democratic"),
    ("罗纳德·里根", "Ronald Reagan", 1981, 1989, "共和党", "Republican"),
    ("乔治·布什", "George Bush", 1989, 1993, "共和党", "Republican"),
    ("比尔·克林顿", "Bill Clinton", 1993, 2001, "民主党", "Democratic"),
    ("贝拉克·奥巴马", "Barack Obama", 2009, 2017, "民主党", "Democratic"),
]  # fmt: skip
PRESIDENT = {
    "zh": ["{y}年的美国总统是谁？", "{y}年谁当美国总统？", "谁是{y}年的美国总统？", "请问{y}年美国总统是哪位？", "{y}年美国的总统是谁？"],
    "en": ["Who was the US president in {y}?", "Who was president of the United States in {y}?",
           "In {y}, who was the American president?", "Name the president of the USA in {y}.", "Which president did the US have in {y}?"],
}  # fmt: skip
PARTY = {
    "zh": ["他是什么党派？", "他属于哪个党？", "他是哪个党的？", "那他是什么党的？", "他的党派是什么？"],
    "en": ["Which party was he in?", "What was his party?", "And his party?", "Of which party was he?", "What party did he belong to?"],
}  # fmt: skip
YEARS = {
    "zh": ["他当了几年总统？", "他任职几年？", "他在任多少年？", "他一共任职了几年？", "他当了多少年？"],
    "en": ["How many years was he in office?", "How long did he serve?", "For how many years was he president?",
           "How long was he in office?", "How many years did he serve?"],
}  # fmt: skip
THAT = {
    "zh": ["那{c}呢？", "{c}呢？", "{c}的呢", "那么{c}呢？", "换成{c}呢？"],
    "en": ["And {c}?", "What about {c}?", "And that of {c}?", "How about {c}?", "and {c}"],
}  # fmt: skip
IT = {
    "zh": {"continent": ["它在哪个洲？", "这个国家在哪个洲？", "那它在哪个大洲？", "它属于哪个洲？", "它位于哪个洲？"],
           "language": ["那里的人说什么语言？", "那里说什么语言？", "他们说什么语言？", "那儿的语言是什么？", "当地人说什么？"]},
    "en": {"continent": ["On which continent is it?", "Which continent is that country on?", "And what continent is it on?",
                         "Where is that country?", "On what continent is that?"],
           "language": ["What language do they speak there?", "Which language is spoken there?", "And the language there?",
                        "What do people speak there?", "What is the language?"]},
}  # fmt: skip
MORE = {
    "zh": [("再加{k}呢？", "+"), ("再加上{k}是多少？", "+"), ("然后加{k}等于几？", "+"), ("再减{k}呢？", "-"), ("再减去{k}是多少？", "-"),
           ("然后减{k}等于几？", "-")],
    "en": [("And plus {k}?", "+"), ("Now add {k}.", "+"), ("Add {k} to that.", "+"), ("And minus {k}?", "-"),
           ("Now subtract {k}.", "-"), ("Take {k} from that.", "-")],
}  # fmt: skip
MY = {
    "zh": [("我叫{x}。", "你好，{x}！", ["我叫什么名字？", "你还记得我的名字吗？", "我叫什么？", "我是谁？", "说出我的名字。"], "你叫{x}。"),
           ("我最喜欢的水果是{x}。", "好的，我记住了。", ["我最喜欢什么水果？", "我爱吃什么水果？", "我说我喜欢什么水果？", "我最爱的水果是哪种？", "还记得我喜欢的水果吗？"], "你最喜欢的水果是{x}。"),
           ("我养了一只{x}。", "真好！", ["我养了什么？", "我家有什么动物？", "我的宠物是什么？", "我养的是什么动物？", "还记得我的宠物吗？"], "你养了一只{x}。"),
           ("我住在{x}。", "好的，我记住了。", ["我住在哪里？", "我住哪儿？", "我说我住在哪里？", "我的家在哪个城市？", "你记得我住在哪里吗？"], "你住在{x}。")],
    "en": [("My name is {x}.", "Hello, {x}!", ["What is my name?", "Do you remember my name?", "Who am I?", "Say my name.", "What did I say my name is?"], "Your name is {x}."),
           ("My favourite fruit is {x}.", "OK, I will remember that.", ["What is my favourite fruit?", "Which fruit do I like?", "What fruit did I name?", "Do you remember my favourite fruit?", "Which fruit is my favourite?"], "Your favourite fruit is {x}."),
           ("I have a {x}.", "How nice!", ["What do I have?", "Which animal do I have?", "What is my pet?", "What pet did I mention?", "Do you remember my pet?"], "You have a {x}."),
           ("I live in {x}.", "OK, I will remember that.", ["Where do I live?", "Which city do I live in?", "Where did I say I live?", "What is my city?", "Do you remember where I live?"], "You live in {x}.")],
}  # fmt: skip
FILL = {
    "zh": [PEOPLE["zh"], ["苹果", "香蕉", "梨", "橘子", "葡萄", "西瓜"], ["猫", "狗", "兔子", "鸟", "乌龟"], ["北京", "上海", "广州", "深圳", "成都", "杭州"]],
    "en": [PEOPLE["en"], ["apple", "banana", "pear", "orange", "melon", "grape"], ["cat", "dog", "rabbit", "bird", "turtle"],
           ["Paris", "London", "Beijing", "Rome", "Berlin", "Tokyo"]],
}  # fmt: skip
SMALL = {
    "zh": [("谢谢！", "不客气！"), ("好的，谢谢", "不客气！")],
    "en": [("Thanks!", "You are welcome!"), ("OK, thank you", "You are welcome!")],
}


def president(writer: Writer, language: str) -> Dialogue:
    row = writer.one(PRESIDENTS)
    index = 0 if language == "zh" else 1
    name, begin, end, party = row[index], row[2], row[3], row[4 + index]
    year = writer.number(begin + 1, end - 1)
    reply = f"{year}年的美国总统是{name}。" if language == "zh" else f"{name} was the US president in {year}."
    turns = [writer.ask(PRESIDENT[language], y=year), reply]
    follow = writer.one([["party"], ["years"], ["party", "years"], ["years"]])
    check: dict[str, object] = {}
    for step in follow:
        if step == "party":
            turns += [
                writer.ask(PARTY[language]),
                f"他是{party}的成员。" if language == "zh" else f"He was in the {party} Party.",
            ]
            check = {"all": [[party]]}
        else:
            years = end - begin
            answer = (
                f"{name}在{begin}年到{end}年担任美国总统，所以他任职了{years}年。"
                if language == "zh"
                else f"{name} was president from {begin} to {end}, that is {years} years."
            )
            turns += [writer.ask(YEARS[language]), answer]
            check = {"number": str(years)}
    return Dialogue(tuple(turns), check)


def other_country(writer: Writer, language: str) -> Dialogue:
    """A capital, then "and that of …?"."""
    first, second = writer.filler(lambda: tuple(writer.some(list(facts.COUNTRIES), 2)))
    said = knowledge.CAPITAL_REPLY[language]
    name, city = facts.country(first, language), facts.capital(first, language)
    other, town = facts.country(second, language), facts.capital(second, language)
    turns = [writer.ask(knowledge.CAPITAL[language], c=name), said.format(c=name, city=city)]
    turns += [writer.ask(THAT[language], c=other), said.format(c=other, city=town)]
    if writer.chance(0.2) and not writer.held:
        return Dialogue((*turns, *writer.one(SMALL[language])))
    return Dialogue(tuple(turns), {"all": [[town.partition(",")[0]]]})


def about_it(writer: Writer, language: str) -> Dialogue:
    """A city's country, then where it is or what is spoken there."""
    code = writer.one(list(facts.SPOKEN))
    if code not in facts.COUNTRIES:
        code = "FR"
    name, city = facts.country(code, language), facts.capital(code, language)
    first = f"{city}是{name}的首都。" if language == "zh" else f"{city} is the capital of {name}."
    turns = [writer.ask(knowledge.OF_CITY[language], city=city), first]
    if writer.chance(0.5):
        word = facts.continent(code, language)
        answer = f"{name}在{word}。" if language == "zh" else f"{name} is in {word}."
        turns += [writer.ask(IT[language]["continent"]), answer]
    else:
        word = facts.names(language)["languages"][facts.SPOKEN[code]]
        answer = f"{name}人说{word}。" if language == "zh" else f"People in {name} speak {word}."
        turns += [writer.ask(IT[language]["language"]), answer]
    return Dialogue(tuple(turns), {"all": [[word]]})


def calculation(writer: Writer, language: str) -> Dialogue:
    a, b, k = writer.filler(lambda: (writer.number(1, 60), writer.number(1, 39), writer.number(1, 20)))
    text, sign = writer.one(MORE[language])
    total = a + b
    k = min(k, total) if sign == "-" else k
    end = "。" if language == "zh" else "."
    turns = [writer.ask(arithmetic.ADD[language], a=a, b=b), arithmetic.steps_of("+", a, b, language) + end]
    turns += [text.format(k=k), arithmetic.steps_of(sign, total, k, language) + end]
    return Dialogue(tuple(turns), {"number": str(total + k if sign == "+" else total - k)})


def remember(writer: Writer, language: str) -> Dialogue:
    kind = writer.number(0, 3)
    said, noted, asked, answer = MY[language][kind]
    x = writer.one(FILL[language][kind])
    turns = [said.format(x=x), noted.format(x=x)]
    if writer.chance(0.35):
        between = writer.one([knowledge.opposite, knowledge.colour])(writer, language)
        turns += list(between.turns)
    turns += [writer.ask(asked), answer.format(x=x)]
    return Dialogue(tuple(turns), {"all": [[x]]})


SKILL = Skill(
    "followup", [(2, president), (1.5, other_country), (1.3, about_it), (1.2, calculation), (2, remember)]
)
