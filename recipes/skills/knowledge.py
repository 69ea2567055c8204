"""Questions of fact from the small world, and an honest "I don't know" to what is outside."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.skills import facts
from recipes.skills.common import PEOPLE, Dialogue, Skill, Writer, split

CAPITAL = {
    "zh": ["{c}的首都是哪里？", "{c}的首都是什么？", "{c}首都是哪个城市？", "请问{c}的首都在哪里？", "哪个城市是{c}的首都？",
           "{c}的首都叫什么名字？", "你知道{c}的首都吗？", "说出{c}的首都。", "{c}首都", "告诉我{c}的首都是哪里。"],
    "en": ["What is the capital of {c}?", "What's {c}'s capital?", "Which city is the capital of {c}?",
           "Name the capital of {c}.", "capital of {c}", "Do you know the capital of {c}?",
           "Tell me the capital of {c}.", "What is {c}'s capital city?", "Can you name the capital of {c}?",
           "{c} has which capital?"],
    "ru": ["Какая столица {c}?", "Назови столицу {c}.", "Какой город — столица {c}?"],
    "fr": ["Quelle est la capitale {c} ?", "Quelle ville est la capitale {c} ?", "Donne-moi la capitale {c}."],
    "ja": ["{c}の首都はどこですか？", "{c}の首都はどこ？", "{c}の首都を教えてください。"],
    "de": ["Was ist die Hauptstadt {c}?", "Wie heißt die Hauptstadt {c}?", "Nenne die Hauptstadt {c}."],
    "es": ["¿Cuál es la capital {c}?", "¿Qué ciudad es la capital {c}?", "Dime la capital {c}."],
}  # fmt: skip
CAPITAL_REPLY = {
    "zh": "{c}的首都是{city}。", "en": "The capital of {c} is {city}.", "ru": "Столица {c} — {city}.",
    "fr": "La capitale {c} est {city}.", "ja": "{c}の首都は{city}です。", "de": "Die Hauptstadt {c} ist {city}.",
    "es": "La capital {c} es {city}.",
}  # fmt: skip
OF_CITY = {
    "zh": ["{city}是哪个国家的首都？", "哪个国家的首都是{city}？", "{city}在哪个国家？", "{city}是哪国的首都？", "{city}属于哪个国家？"],
    "en": ["{city} is the capital of which country?", "Which country has the capital {city}?",
           "What country is {city} in?", "In which country is {city}?", "Of which country is {city} the capital?"],
}  # fmt: skip
RELATION = {
    "zh": ["{a}和{b}是什么关系？", "{a}与{b}有什么关系？", "{a}和{b}之间有什么关系？", "说说{a}和{b}的关系。", "{a}跟{b}是什么关系？"],
    "en": ["How are {a} and {b} related?", "What is the relation between {a} and {b}?",
           "What connects {a} and {b}?", "What has {a} to do with {b}?", "What is {a} to {b}?"],
}  # fmt: skip
CONTINENT = {
    "zh": ["{c}在哪个洲？", "{c}属于哪个大洲？", "{c}位于哪个洲？", "请问{c}在哪个大洲？", "{c}是哪个洲的国家？"],
    "en": ["On which continent is {c}?", "Which continent is {c} on?", "What continent does {c} belong to?",
           "Where is {c}?", "{c} is on which continent?"],
}  # fmt: skip
SPEAK = {
    "zh": ["{c}人说什么语言？", "{c}说什么语言？", "在{c}人们说什么话？", "{c}的语言是什么？", "去{c}要会什么语言？"],
    "en": ["What language do people speak in {c}?", "Which language is spoken in {c}?",
           "What do they speak in {c}?", "What is the language of {c}?", "Which language is used in {c}?"],
}  # fmt: skip
MONEY = {
    "zh": ["{c}用什么货币？", "{c}的货币是什么？", "在{c}用什么钱？", "{c}的钱叫什么？", "去{c}要换什么钱？"],
    "en": ["What is the currency of {c}?", "Which currency does {c} use?", "What money is used in {c}?",
           "What money do I need in {c}?", "What currency do they have in {c}?"],
}  # fmt: skip
LEGS = {
    "zh": ["{a}有几条腿？", "{a}有多少条腿？", "一只{a}有几条腿？", "请问{a}有几条腿？", "{a}长了几条腿？", "{a}的腿有几条？"],
    "en": ["How many legs does {an} have?", "How many legs has {an}?", "{An} has how many legs?",
           "Tell me how many legs {an} has.", "What number of legs does {an} have?"],
    "ru": ["Сколько ног {a}?", "Скажи, сколько ног {a}?"],
    "fr": ["Combien de pattes a {a} ?", "{A} a combien de pattes ?"],
    "ja": ["{a}の足は何本ですか？", "{a}には足が何本ありますか？"],
    "de": ["Wie viele Beine hat {a}?", "Sag mir, wie viele Beine {a} hat."],
    "es": ["¿Cuántas patas tiene {a}?", "Dime cuántas patas tiene {a}."],
}  # fmt: skip
SOUND = {
    "zh": ["{a}怎么叫？", "{a}的叫声是什么？", "{a}是怎么叫的？", "学一学{a}叫。", "{a}会发出什么声音？"],
    "en": ["What sound does {an} make?", "What does {an} say?", "How does {an} sound?", "Make the sound of {an}.",
           "Which sound does {an} make?"],
}  # fmt: skip
HOME = {
    "zh": ["{a}住在哪里？", "{a}生活在什么地方？", "哪里能找到{a}？", "{a}的家在哪里？", "{a}一般住哪儿？"],
    "en": ["Where does {an} live?", "Where can you find {an}?", "What is the home of {an}?",
           "Where do {a}s live?", "In what place does {an} live?"],
}  # fmt: skip
KIND = {
    "zh": ["{a}是什么动物？", "{a}属于哪一类动物？", "{a}是鸟还是哺乳动物，还是别的？", "{a}是哪种动物？", "{a}算什么动物？"],
    "en": ["What kind of animal is {an}?", "Is {an} a mammal, a bird or something else?",
           "Which class of animals does {an} belong to?", "What type of animal is {an}?", "{An} is what kind of animal?"],
}  # fmt: skip
FOOD = {
    "zh": ["{a}吃什么？", "{a}喜欢吃什么？", "{a}的食物是什么？", "{a}平时吃什么？", "给{a}喂什么？"],
    "en": ["What does {an} eat?", "What do you feed {an}?", "What is the food of {an}?", "What does {an} like to eat?",
           "Which food does {an} eat?"],
}  # fmt: skip
YOUNG = {"en": ["What is a young {a} called?", "What do you call a baby {a}?", "What is the young of {an}?",
                "A baby {a} is called what?", "Name the young of {an}."]}  # fmt: skip
OPPOSITE = {
    "zh": ["“{w}”的反义词是什么？", "{w}的反义词", "{w}的反义词是什么？", "和“{w}”相反的词是什么？", "“{w}”反过来是什么？",
           "给出“{w}”的反义词。", "{w}的对立面是什么？"],
    "en": ["What is the opposite of {w}?", "opposite of {w}", "What's the opposite of \"{w}\"?",
           "Give me the opposite of {w}.", "Which word is the opposite of {w}?", "What is the antonym of {w}?",
           "{w} is the opposite of what?"],
}  # fmt: skip
COLOUR = {
    "zh": ["{t}是什么颜色？", "{t}是什么颜色的？", "{t}的颜色是什么？", "请问{t}是什么颜色？", "{t}一般是什么颜色？"],
    "en": ["What colour is {t}?", "What color is {t}?", "Which colour does {t} have?", "Tell me the colour of {t}.",
           "{T} has what colour?"],
}  # fmt: skip
NEXT = {
    "zh": [("{w}的后面是什么？", 1), ("{w}之后是什么？", 1), ("{w}过后是什么？", 1), ("{w}的前面是什么？", -1), ("{w}之前是什么？", -1)],
    "en": [("What comes after {w}?", 1), ("What follows {w}?", 1), ("What is next after {w}?", 1),
           ("What comes before {w}?", -1), ("What precedes {w}?", -1)],
    "ru": [("Что идёт после: {w}?", 1), ("Что идёт перед: {w}?", -1)],
    "fr": [("Qu'est-ce qui vient après {w} ?", 1), ("Qu'est-ce qui vient avant {w} ?", -1)],
    "ja": [("{w}の次は何ですか？", 1), ("{w}の前は何ですか？", -1)],
    "de": [("Was kommt nach {w}?", 1), ("Was kommt vor {w}?", -1)],
    "es": [("¿Qué viene después de {w}?", 1), ("¿Qué viene antes de {w}?", -1)],
}  # fmt: skip
NEXT_REPLY = {
    "zh": ("{w}的后面是{n}。", "{w}的前面是{n}。"), "en": ("{n} comes after {w}.", "{n} comes before {w}."),
    "ru": ("После {w} идёт {n}.", "Перед {w} идёт {n}."), "fr": ("Après {w} vient {n}.", "Avant {w} vient {n}."),
    "ja": ("{w}の次は{n}です。", "{w}の前は{n}です。"), "de": ("Nach {w} kommt {n}.", "Vor {w} kommt {n}."),
    "es": ("Después de {w} viene {n}.", "Antes de {w} viene {n}."),
}  # fmt: skip
PLAIN = {
    "zh": ["{q}？", "请问{q}？", "你知道{q}吗？", "{q}", "告诉我{q}。", "我想知道{q}。"],
    "en": ["{q}?", "{q}", "{q}, please?", "Do you know this: {q}?", "Tell me: {q}?", "Quick question: {q}?"],
}  # fmt: skip
AUTHOR = {
    "zh": ["{t}的作者是谁？", "{t}是谁写的？", "谁写了{t}？", "{t}这本书是谁的作品？", "请问{t}的作者是哪位？"],
    "en": ["Who wrote {t}?", "Who is the author of {t}?", "{t} was written by whom?", "Tell me who wrote {t}.",
           "Do you know the author of {t}?"],
}  # fmt: skip
UNKNOWN = {
    "zh": ["今天{city}天气怎么样？", "{city}明天会下雨吗？", "现在几点了，在{city}？", "{city}现在有多少人口？", "{city}的房价是多少？",
           "{who}昨天吃了什么？", "我的邻居{who}在想什么？", "{who}的电话号码是多少？", "{who}今年多大了？", "我口袋里有什么？",
           "下一期彩票的号码是多少？", "{city}今天有什么新闻？", "{who}住在哪里？", "明年的股市会涨吗？", "{city}最好吃的餐厅是哪家？",
           "2050年的世界冠军是谁？", "《{who}的第{n}本日记》讲了什么？", "{who}和{other}昨天聊了什么？", "从{city}坐飞机要多少钱？",
           "{city}市长是谁？"],
    "en": ["What is the weather in {city} today?", "Will it rain in {city} tomorrow?", "What time is it in {city} now?",
           "How many people live in {city} right now?", "How expensive is a flat in {city}?",
           "What did {who} eat yesterday?", "What is my neighbour {who} thinking?", "What is {who}'s phone number?",
           "How old is {who} this year?", "What is in my pocket?", "Which numbers win the next lottery?",
           "What is in the news in {city} today?", "Where does {who} live?", "Will shares rise next year?",
           "Which is the best restaurant in {city}?", "Who will be world champion in 2050?",
           "What is the book \"{who}'s diary number {n}\" about?", "What did {who} and {other} talk about yesterday?",
           "How much is a flight from {city}?", "Who is the mayor of {city}?"],
    "ru": ["Какая сегодня погода?", "Какой номер выиграет в лотерее?", "Что сегодня в новостях?"],
    "fr": ["Quel temps fait-il aujourd'hui ?", "Quels numéros vont gagner au loto ?", "Quelles sont les nouvelles ?"],
    "ja": ["今日の天気はどうですか？", "次の宝くじの番号は何ですか？", "今日のニュースは何ですか？"],
    "de": ["Wie ist das Wetter heute?", "Welche Lottozahlen gewinnen?", "Was gibt es heute Neues?"],
    "es": ["¿Qué tiempo hace hoy?", "¿Qué números ganarán la lotería?", "¿Qué noticias hay hoy?"],
}  # fmt: skip
DECLINE = {
    "zh": ["这个我不知道。我不能上网，只知道一些简单的事。", "对不起，我不知道。这超出了我的知识范围。", "我不知道，也不想乱猜。"],
    "en": ["I don't know. I cannot go online and know only simple things.", "Sorry, I don't know. That is beyond me.",
           "I don't know that, and I would rather not guess."],
    "ru": ["Я не знаю. У меня нет доступа к интернету."], "fr": ["Je ne sais pas. Je n'ai pas accès à Internet."],
    "ja": ["わかりません。インターネットに接続できません。"], "de": ["Das weiß ich nicht. Ich habe keinen Zugang zum Internet."],
    "es": ["No lo sé. No tengo acceso a Internet."],
}  # fmt: skip


def _index(language: str) -> int:
    return 0 if language == "zh" else 1


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def _fact(writer: Writer, language: str, phrasings: dict[str, list[str]], reply: dict[str, str], *names: str,
          **values: object) -> Dialogue:  # fmt: skip
    """A question whose reply has to contain each of ``names`` (alternatives separated by |)."""
    question = writer.ask(phrasings[language], **values)
    return Dialogue(
        (
            question[0].upper() + question[1:] if language != "zh" else question,
            reply[language].format(**values),
        ),
        {"all": [name.split("|") for name in names]},
    )


def capital(writer: Writer, language: str) -> Dialogue:
    code = writer.one(list(facts.COUNTRIES))
    city = facts.capital(code, language)
    short = city.partition(",")[0]
    return _fact(writer, language, CAPITAL, CAPITAL_REPLY, short, c=facts.country(code, language), city=city)


def capital_abroad(writer: Writer, language: str) -> Dialogue:
    name, city = writer.one(list(facts.ABROAD.values()))[language]
    return _fact(writer, language, CAPITAL, CAPITAL_REPLY, city, c=name, city=city)


def of_city(writer: Writer, language: str) -> Dialogue:
    code = writer.one(list(facts.COUNTRIES))
    values = {"c": facts.country(code, language), "city": facts.capital(code, language)}
    reply = {"zh": "{city}是{c}的首都。", "en": "{city} is the capital of {c}."}
    return _fact(writer, language, OF_CITY, reply, str(values["c"]), **values)


def place(writer: Writer, language: str) -> Dialogue:
    """A country's continent, language or currency."""
    kind = writer.number(0, 2)
    if kind == 0:
        code = writer.one(list(facts.COUNTRIES))
        values = {"c": facts.country(code, language), "x": facts.continent(code, language)}
        return _fact(
            writer, language, CONTINENT, {"zh": "{c}在{x}。", "en": "{c} is in {x}."}, values["x"], **values
        )
    table, phrasings, names, reply = (
        (facts.SPOKEN, SPEAK, "languages", {"zh": "{c}人说{x}。", "en": "People in {c} speak {x}."}),
        (
            facts.MONEY,
            MONEY,
            "currencies",
            {"zh": "{c}的货币是{x}。", "en": "The currency of {c} is the {x}."},
        ),
    )[kind - 1]
    code = writer.one(list(table))
    values = {"c": facts.country(code, language), "x": facts.names(language)[names][table[code]]}
    return _fact(writer, language, phrasings, reply, values["x"], **values)


def relation(writer: Writer, language: str) -> Dialogue:
    """How two named things are related: capital, author, continent, young."""
    index, kind = _index(language), writer.number(0, 2)
    if kind == 0:
        code = writer.one(list(facts.COUNTRIES))
        a, b = facts.capital(code, language), facts.country(code, language)
        reply = {"zh": "{a}是{b}的首都。", "en": "{a} is the capital of {b}."}
        word = "首都|capital"
    elif kind == 1:
        book = writer.one(facts.BOOKS)
        a, b = book[2 + index], book[index]
        reply = {"zh": "{a}是{b}的作者。", "en": "{a} is the author of {b}."}
        word = "作者|author|写|wrote"
    else:
        code = writer.one(list(facts.COUNTRIES))
        a, b = facts.country(code, language), facts.continent(code, language)
        reply = {"zh": "{a}是{b}的一个国家。", "en": "{a} is a country in {b}."}
        word = "国家|country"
    return _fact(writer, language, RELATION, reply, word, a=a, b=b)


def animal(writer: Writer, language: str) -> Dialogue:
    index = _index(language)
    row = writer.one(facts.ANIMALS)
    values: dict[str, object] = {"a": row[index], "an": _article(row[1]), "An": _article(row[1]).capitalize()}
    kind = writer.number(0, 5)
    if kind == 0 and row[3 + index]:
        reply = {"zh": "{a}的叫声是“{x}”。", "en": '{An} says "{x}".'}
        return _fact(writer, language, SOUND, reply, row[3 + index], x=row[3 + index], **values)
    if kind == 1:
        reply = {"zh": "{a}住在{x}。", "en": "{An} lives in {x}."}
        if language == "en" and row[1] in ("sheep", "fish"):
            return legs(writer, language)
        return _fact(writer, language, HOME, reply, str(row[5 + index]), x=row[5 + index], **values)
    if kind == 2:
        reply = {"zh": "{a}是{x}。", "en": "{An} is {x}."}
        noun = row[8 + index] if language == "zh" else _article(str(row[9]))
        return _fact(writer, language, KIND, reply, str(row[8 + index]), x=noun, **values)
    if kind == 3:
        reply = {"zh": "{a}吃{x}。", "en": "{An} eats {x}."}
        if row[10] == "杂食":
            return legs(writer, language)
        return _fact(writer, language, FOOD, reply, str(row[10 + index]), x=row[10 + index], **values)
    if kind == 4 and language == "en" and row[7]:
        reply = {"en": "A young {a} is called {x}."}
        return _fact(writer, language, YOUNG, reply, row[7], x=_article(row[7]), **values)
    return legs(writer, language)


def legs(writer: Writer, language: str) -> Dialogue:
    index = _index(language)
    row = writer.one(facts.ANIMALS)
    word = facts.NUMBERS[row[2]][index]
    reply = {"zh": "{a}有{x}条腿。" if row[2] else "{a}没有腿。", "en": "{An} has {x} legs."}
    accepted = {0: "没有|no |0|零", 2: "两|2|two|二"}.get(row[2], f"{word}|{row[2]}")
    values = {"a": row[index], "an": _article(row[1]), "An": _article(row[1]).capitalize()}
    return _fact(writer, language, LEGS, reply, accepted, x=word, **values)


def legs_abroad(writer: Writer, language: str) -> Dialogue:
    a, reply = writer.one(facts.LEGS_ABROAD[language])
    question = writer.ask(LEGS[language], a=a, A=a[0].upper() + a[1:])
    return Dialogue((question, reply), {"all": [[reply]]})


def opposite(writer: Writer, language: str) -> Dialogue:
    pair = writer.one(facts.OPPOSITES[language])
    a, b = pair if language == "zh" else pair.split()
    if writer.chance(0.5) and pair not in ("young old", "new old"):
        a, b = b, a
    question = writer.ask(OPPOSITE[language], w=a)
    reply = f"“{a}”的反义词是“{b}”。" if language == "zh" else f"The opposite of {a} is {b}."
    return Dialogue((question, reply), {"all": [[b]]})


def colour(writer: Writer, language: str) -> Dialogue:
    index = _index(language)
    row = writer.one(facts.COLOURS)
    thing = row[index]
    reply = {"zh": "{t}是{x}的。", "en": "{T} is {x}."}
    return _fact(
        writer, language, COLOUR, reply, row[2 + index].rstrip("色"), t=thing, T=thing[0].upper() + thing[1:],
        x=row[2 + index],
    )  # fmt: skip


def calendar(writer: Writer, language: str) -> Dialogue:
    table = facts.names(language)[writer.one(["days", "months"])]
    numbers = sorted(table, key=int)
    place = writer.number(0, len(numbers) - 1)
    question, step = writer.one([one for one in NEXT[language] if one[0] in _side(writer, language)])
    word, following = table[numbers[place]], table[numbers[(place + step) % len(numbers)]]
    reply = NEXT_REPLY[language][0 if step > 0 else 1].format(w=word, n=following)
    return Dialogue((question.format(w=word), reply[0].upper() + reply[1:]), {"all": [[following]]})


def _side(writer: Writer, language: str) -> Sequence[str]:
    texts = [text for text, _ in NEXT[language]]
    return split(texts, writer.held) if len(texts) > 2 else texts


def measure(writer: Writer, language: str) -> Dialogue:
    row = writer.one(facts.MEASURES)
    index = _index(language)
    return Dialogue((writer.ask(PLAIN[language], q=row[index]), row[2 + index]), {"all": [list(row[4])]})


def author(writer: Writer, language: str) -> Dialogue:
    row, index = writer.one(facts.BOOKS), _index(language)
    reply = {"zh": "{t}的作者是{x}。", "en": "{x} wrote {t}."}
    values = {"t": row[index], "x": row[2 + index]}
    return _fact(writer, language, AUTHOR, reply, values["x"].rpartition(" ")[2], **values)


def unknown(writer: Writer, language: str) -> Dialogue:
    people = PEOPLE.get(language, PEOPLE["en"])
    who, other = writer.some(people, 2)
    code = writer.one(list(facts.COUNTRIES))
    values = {"who": who, "other": other, "city": facts.capital(code, language), "n": writer.number(2, 9)}
    return Dialogue(
        (writer.ask(UNKNOWN[language], **values), writer.say(DECLINE[language])), {"declines": True}
    )


SKILL = Skill(
    "knowledge",
    [(3, capital), (1.5, of_city), (2, place), (1.5, relation), (3, animal), (1, legs), (1.5, opposite), (1, colour),
     (1.5, calendar), (1.5, measure), (1, author), (3, unknown)],
    [(2, capital_abroad, ("ru", "fr", "ja", "de", "es")), (2, legs_abroad, ("ru", "fr", "ja", "de", "es")),
     (1, calendar, ("fr", "ja", "de", "es")), (1, unknown, ("ru", "fr", "ja", "de", "es"))],
)  # fmt: skip
