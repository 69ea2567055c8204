"""Small conclusions: orders, classes, sequences, days, the odd one out, and why things happen."""

from __future__ import annotations

from recipes.skills import facts
from recipes.skills.common import PEOPLE, Dialogue, Skill, Writer

# (more, most, least) of a quality
QUALITIES = {
    "zh": [("高", "最高", "最矮"), ("大", "年龄最大", "年龄最小"), ("重", "最重", "最轻"), ("跑得快", "跑得最快", "跑得最慢"),
           ("来得早", "来得最早", "来得最晚")],
    "en": [("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("heavier", "heaviest", "lightest"),
           ("faster", "fastest", "slowest"), ("stronger", "strongest", "weakest")],
}  # fmt: skip
ORDER = {
    "zh": ["{a}比{b}{more}，{b}比{c}{more}。谁{most}？", "已知{a}比{b}{more}，{b}又比{c}{more}，三人中谁{most}？",
           "{b}比{c}{more}，{a}比{b}{more}，谁{most}？", "如果{a}比{b}{more}，而且{b}比{c}{more}，那么谁{most}？",
           "{a}比{b}{more}。{b}比{c}{more}。请问谁{most}？"],
    "en": ["{a} is {more} than {b}, and {b} is {more} than {c}. Who is the {most}?",
           "{a} is {more} than {b}. {b} is {more} than {c}. Who is {most}?",
           "{b} is {more} than {c}, but {a} is {more} than {b}. Who is the {most}?",
           "If {a} is {more} than {b} and {b} is {more} than {c}, who is the {most}?",
           "We know that {a} is {more} than {b} and {b} is {more} than {c}. Who is the {most}?"],
}  # fmt: skip
PAIR = {
    "zh": ["{a}比{b}{more}。{q}{more}吗？", "已知{a}比{b}{more}，那么{q}{more}吗？", "{a}比{b}{more}，请问{q}{more}吗？",
           "如果{a}比{b}{more}，{q}{more}吗？", "{a}比{b}{more}，对吗，{q}{more}？"],
    "en": ["{a} is {more} than {b}. Is {q}?", "If {a} is {more} than {b}, is {q}?", "{a} is {more} than {b}; is {q}?",
           "We know {a} is {more} than {b}. Is {q}?", "Suppose {a} is {more} than {b}. Is {q}?"],
}  # fmt: skip
# member, class, a class that it does not belong to
CLASSES = {
    "zh": [("猫", "动物", "植物"), ("狗", "动物", "水果"), ("苹果", "水果", "动物"), ("玫瑰", "花", "石头"), ("铁", "金属", "水果"),
           ("鲸", "哺乳动物", "鱼"), ("麻雀", "鸟", "昆虫"), ("蚂蚁", "昆虫", "鸟"), ("胡萝卜", "蔬菜", "金属"), ("松树", "树", "花"),
           ("汽车", "交通工具", "动物"), ("钢琴", "乐器", "水果"), ("医生", "职业", "乐器"), ("足球", "运动", "蔬菜"), ("金", "金属", "木头"),
           ("老虎", "动物", "交通工具"), ("蝙蝠", "哺乳动物", "鸟"), ("企鹅", "鸟", "鱼"), ("香蕉", "水果", "金属"), ("小提琴", "乐器", "花")],
    "en": [("cat", "animal", "plant"), ("dog", "animal", "fruit"), ("apple", "fruit", "animal"), ("rose", "flower", "stone"),
           ("bus", "vehicle", "fruit"), ("whale", "mammal", "fish"), ("sparrow", "bird", "insect"), ("ant", "insect", "bird"),
           ("carrot", "vegetable", "metal"), ("pine", "tree", "flower"), ("car", "vehicle", "animal"),
           ("piano", "musical instrument", "fruit"), ("doctor", "person", "plant"), ("hammer", "tool", "vegetable"),
           ("tiger", "animal", "vehicle"), ("bat", "mammal", "bird"), ("penguin", "bird", "fish"), ("banana", "fruit", "metal"),
           ("violin", "musical instrument", "flower"), ("chair", "piece of furniture", "drink")],
}  # fmt: skip
IS_A = {
    "zh": ["{x}是{y}吗？", "请问{x}是不是{y}？", "{x}属于{y}吗？", "{x}算{y}吗？", "判断对错：{x}是{y}。"],
    "en": ["Is a {x} a {y}?", "Is every {x} a {y}?", "True or false: a {x} is a {y}.", "Would you call a {x} a {y}?",
           "Yes or no: is a {x} a {y}?"],
}  # fmt: skip
SYLLOGISM = {
    "zh": ["所有的{x}都是{y}，{n}是一只{x}，{n}是{y}吗？", "如果{x}都是{y}，而{n}是{x}，那么{n}是{y}吗？",
           "{x}都是{y}。{n}是{x}。{n}是{y}吗？", "已知每个{x}都是{y}，{n}是{x}，问：{n}是{y}吗？", "凡是{x}都是{y}，{n}是{x}，所以{n}是{y}吗？"],
    "en": ["All {x}s are {y}s. {n} is a {x}. Is {n} a {y}?", "If every {x} is a {y} and {n} is a {x}, is {n} a {y}?",
           "Every {x} is a {y}. {n} is a {x}. Is {n} a {y}?", "{n} is a {x}, and all {x}s are {y}s. Is {n} a {y}?",
           "Suppose all {x}s are {y}s and {n} is a {x}. Is {n} a {y}?"],
}  # fmt: skip
MADE_UP = {"zh": ["咕咕兽", "卡卡", "米米虫", "波波", "露露花", "多多", "皮皮兽", "乌乌"],
           "en": ["wug", "blick", "dax", "zorp", "fep", "toma", "glim", "norp"]}  # fmt: skip
SEQUENCE = {
    "zh": ["{s}，下一个数是多少？", "找规律：{s}，?", "{s}，后面是什么数？", "数列{s}的下一项是什么？", "按规律填空：{s}，（）"],
    "en": ["What comes next: {s}?", "{s}, what is the next number?", "Continue the sequence: {s}",
           "Which number follows {s}?", "Find the next number: {s}, ?"],
}  # fmt: skip
DAYS = {
    "zh": ["今天是{d}，{n}天后是星期几？", "如果今天是{d}，那么再过{n}天是星期几？", "今天{d}，过{n}天是星期几？", "{d}之后{n}天是星期几？",
           "假如今天是{d}，{n}天以后是星期几？"],
    "en": ["Today is {d}. What day is it in {n} days?", "If today is {d}, what day will it be in {n} days?",
           "It is {d} today. Which day is it {n} days later?", "Which day is {n} days after {d}?",
           "Suppose it is {d}. What day is it after {n} days?"],
}  # fmt: skip
COMPARE = {
    "zh": ["{a}和{b}哪个大？", "{a}和{b}，哪个数更大？", "{a}大还是{b}大？", "比较{a}和{b}的大小。", "哪个更大，{a}还是{b}？"],
    "en": ["Which is larger, {a} or {b}?", "Is {a} or {b} the larger number?", "Compare {a} and {b}.",
           "What is more, {a} or {b}?", "Which number is bigger: {a} or {b}?"],
}  # fmt: skip
GROUPS = {
    "zh": [("水果", "苹果 香蕉 梨 橘子 葡萄 西瓜"), ("动物", "猫 狗 牛 羊 兔子 老虎"), ("颜色", "红色 蓝色 绿色 黄色 白色 黑色"),
           ("交通工具", "汽车 火车 飞机 轮船 自行车 公共汽车"), ("家具", "桌子 椅子 床 柜子 沙发 书架"), ("乐器", "钢琴 吉他 小提琴 鼓 笛子 二胡"),
           ("职业", "医生 老师 司机 厨师 警察 农民"), ("衣服", "衬衫 裤子 裙子 外套 毛衣 袜子")],
    "en": [("a fruit", "apple banana pear orange grape melon"), ("an animal", "cat dog cow sheep rabbit tiger"),
           ("a colour", "red blue green yellow white black"), ("a vehicle", "car train plane ship bicycle bus"),
           ("furniture", "table chair bed cupboard sofa shelf"), ("an instrument", "piano guitar violin drum flute trumpet"),
           ("a job", "doctor teacher driver cook farmer nurse"), ("clothing", "shirt trousers skirt coat sweater socks")],
}  # fmt: skip
ODD = {
    "zh": ["{l}，哪个不同类？", "下面哪个和其他的不一样：{l}？", "找出不同类的词：{l}", "{l}中哪个不属于同一类？", "{l}里哪个是多余的？"],
    "en": ["Which one does not belong: {l}?", "Find the odd one out: {l}", "Which word is different: {l}?",
           "{l}: which is the odd one out?", "Which of these does not fit: {l}?"],
}  # fmt: skip
WHY = {
    "zh": [("天会下雨", "空气中的水汽遇冷变成水滴，水滴太重就落下来。", "水"), ("冬天会下雪", "云里的水汽在低温下结成雪花，落到地面。", "雪花|水汽|低温"),
           ("会有白天和黑夜", "因为地球自转，朝着太阳的一面是白天。", "地球|自转"), ("会有四季", "因为地球的轴是倾斜的，绕着太阳转。", "倾斜|太阳"),
           ("冰会浮在水上", "因为冰比水轻。", "轻|密度"), ("月亮会发光", "月亮自己不发光，它反射太阳的光。", "反射|太阳"),
           ("树叶秋天会落", "天冷时树木落叶，可以减少水分的消耗。", "水分|冷"), ("海水是咸的", "河水把岩石里的盐带进了大海。", "盐"),
           ("苹果会落到地上", "因为地球的引力把它拉向地面。", "引力|重力"), ("铁会生锈", "铁和水、空气中的氧发生了反应。", "氧|水"),
           ("人要睡觉", "睡觉让身体和大脑得到休息。", "休息"), ("要刷牙", "刷牙能去掉食物残渣，保护牙齿。", "牙"),
           ("植物需要阳光", "植物用阳光制造养分。", "养分|光合"), ("打雷前先看到闪电", "因为光比声音跑得快。", "光|快"),
           ("鱼能在水里呼吸", "鱼用鳃吸取水里的氧气。", "鳃|氧"), ("影子会变长", "太阳低的时候，影子就长。", "太阳"),
           ("切洋葱会流泪", "洋葱放出的气体刺激眼睛。", "刺激|气体"), ("鸟会飞", "鸟有翅膀，骨头又轻。", "翅膀"),
           ("气球会升空", "里面的气体比空气轻。", "轻"), ("火要用空气", "燃烧需要氧气。", "氧")],
    "en": [("does it rain", "Water vapour cools to drops in the clouds, and heavy drops fall.", "water|drops"),
           ("does it snow in winter", "Water vapour in the clouds freezes to flakes and falls.", "freez|flakes"),
           ("is there day and night", "The Earth turns; the side that faces the sun has day.", "Earth|turn"),
           ("are there seasons", "The Earth's axis is tilted while it goes around the sun.", "tilt|axis"),
           ("does ice float on water", "Ice is lighter than water.", "lighter|dens"),
           ("does the moon shine", "The moon reflects the light of the sun.", "reflect|sun"),
           ("do leaves fall in autumn", "Trees drop their leaves to save water in the cold.", "water|cold"),
           ("is the sea salty", "Rivers carry salt from rocks into the sea.", "salt|rock"),
           ("does an apple fall down", "The Earth's gravity pulls it to the ground.", "gravity"),
           ("does iron rust", "Iron reacts with water and the oxygen in the air.", "oxygen|water"),
           ("do people sleep", "Sleep lets body and brain rest.", "rest"),
           ("should I brush my teeth", "Brushing removes food and protects the teeth.", "teeth|food"),
           ("do plants need light", "Plants use light to make their food.", "food|energy"),
           ("do we see lightning before thunder", "Light travels faster than sound.", "fast"),
           ("can fish breathe in water", "Fish take oxygen from water with their gills.", "gill|oxygen"),
           ("do shadows get longer", "When the sun is low, shadows are long.", "sun"),
           ("do onions make me cry", "Onions give off a gas that stings the eyes.", "gas|sting"),
           ("can birds fly", "Birds have wings and light bones.", "wing"),
           ("do balloons rise", "The gas inside is lighter than air.", "lighter"),
           ("does fire need air", "Burning needs oxygen.", "oxygen")],
}  # fmt: skip
ASK_WHY = {
    "zh": ["为什么{w}？", "{w}是为什么？", "为什么{w}呢？", "请解释为什么{w}。", "能告诉我为什么{w}吗？", "{w}的原因是什么？"],
    "en": ["Why {w}?", "Tell me: why {w}?", "Why {w}, in one sentence?", "Do you know why? Why {w}?",
           "Explain briefly: why {w}?", "I wonder: why {w}?"],
}  # fmt: skip


def _yes(language: str, right: bool) -> str:
    return ("是的" if right else "不是") if language == "zh" else ("Yes" if right else "No")


def _verdict(language: str, right: bool) -> dict[str, object]:
    """Accepts a reply that says yes or no at its beginning."""
    zh = ["是的", "是", "对"] if right else ["不"]
    return {"starts": zh if language == "zh" else ["yes", "true"] if right else ["no", "false"]}


def order(writer: Writer, language: str) -> Dialogue:
    a, b, c = writer.filler(lambda: tuple(writer.some(PEOPLE[language], 3)))
    more, most, least = writer.one(QUALITIES[language])
    top = writer.chance(0.5)
    wanted, answer = (most, a) if top else (least, c)
    question = writer.ask(ORDER[language], a=a, b=b, c=c, more=more, most=wanted)
    reply = f"{answer}{wanted}。" if language == "zh" else f"{answer} is the {wanted}."
    others = [name for name in (a, b, c) if name != answer]
    return Dialogue((question, reply), {"all": [[answer]], "none": others})


def pair(writer: Writer, language: str) -> Dialogue:
    a, b = writer.filler(lambda: tuple(writer.some(PEOPLE[language], 2)))
    more = writer.one(QUALITIES[language])[0]
    right = writer.chance(0.5)
    one, other = (a, b) if right else (b, a)
    q = f"{one}比{other}" if language == "zh" else f"{one} {more} than {other}"
    question = writer.ask(PAIR[language], a=a, b=b, more=more, q=q)
    reply = (
        f"{_yes(language, right)}，{a}比{b}{more}。"
        if language == "zh"
        else f"{_yes(language, right)}, {a} is {more} than {b}."
    )
    return Dialogue((question, reply), _verdict(language, right))


def _a(text: str) -> str:
    import re

    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def is_a(writer: Writer, language: str) -> Dialogue:
    x, y, z = writer.one(CLASSES[language])
    right = writer.chance(0.5)
    other = y if right else z
    question = writer.ask(IS_A[language], x=x, y=other)
    if language == "zh":
        tail = f"{x}是{y}" + ("" if right else f"，不是{z}")
        return Dialogue((question, f"{_yes(language, right)}，{tail}。"), _verdict(language, right))
    tail = f"a {x} is a {y}" + ("" if right else f", not a {z}")
    return Dialogue((_a(question), _a(f"{_yes(language, right)}, {tail}.")), _verdict(language, right))


def syllogism(writer: Writer, language: str) -> Dialogue:
    x, n = writer.filler(lambda: (writer.one(MADE_UP[language]), writer.one(PEOPLE[language])))
    y = writer.one([row[1] for row in CLASSES[language] if " " not in row[1]])
    question = writer.ask(SYLLOGISM[language], x=x, y=y, n=n)
    reply = (
        f"是的，{n}是{y}，因为所有的{x}都是{y}。"
        if language == "zh"
        else f"Yes, {n} is a {y}, because every {x} is a {y}."
    )
    return Dialogue((_a(question) if language == "en" else question, _a(reply) if language == "en" else reply),
                    _verdict(language, True))  # fmt: skip


def sequence(writer: Writer, language: str) -> Dialogue:
    start, step = writer.filler(lambda: (writer.number(1, 20), writer.number(1, 10)))
    if writer.chance(0.25):
        start += 4 * step + writer.number(1, 9)
        step = -step
    values = [start + step * number for number in range(5)]
    comma = "，" if language == "zh" else ", "
    question = writer.ask(SEQUENCE[language], s=comma.join(map(str, values[:4])))
    sign = f"+{step}" if step > 0 else str(step)
    high, low = max(values[2:4]), min(values[2:4])
    first, last = f"{high}-{low}={abs(step)}", f"{values[3]}{sign}={values[4]}"
    reply = (
        f"{first}，每次{'加' if step > 0 else '减'}{abs(step)}，{last}。"
        if language == "zh"
        else f"{first}, so each step {'adds' if step > 0 else 'takes'} {abs(step)}: {last}."
    )
    return Dialogue((question, reply), {"number": str(values[4])})


def days(writer: Writer, language: str) -> Dialogue:
    place, count = writer.filler(lambda: (writer.number(0, 6), writer.number(1, 6)))
    names = facts.names(language)["days"]
    day, later = names[str(place)], names[str((place + count) % 7)]
    question = writer.ask(DAYS[language], d=day, n=count)
    if language == "en" and count == 1:
        question = question.replace("1 days", "1 day")
    walk = [names[str((place + number) % 7)] for number in range(1, count + 1)]
    # Numbered, so that a model stops at the right one.
    numbered = [f"{number} {name}" for number, name in enumerate(walk, 1)]
    steps = ("、" if language == "zh" else ", ").join(numbered)
    reply = f"往后数：{steps}。是{later}。" if language == "zh" else f"Count on: {steps}. It is {later}."
    return Dialogue((question, reply), {"last": [later, *walk]})


def compare(writer: Writer, language: str) -> Dialogue:
    high = writer.one([20, 99, 999])
    a, b = writer.filler(lambda: (writer.number(1, high), writer.number(1, high)))
    b += a == b
    question = writer.ask(COMPARE[language], a=a, b=b)
    top, low = max(a, b), min(a, b)
    reply = f"{top}更大，{top}>{low}。" if language == "zh" else f"{top} is larger: {top}>{low}."
    return Dialogue((question, reply), {"first": [str(top), str(low)]})


def odd(writer: Writer, language: str) -> Dialogue:
    (name, group), (_, strange) = writer.some(GROUPS[language], 2)
    words, other = writer.filler(lambda: (tuple(writer.some(group.split(), 3)), writer.one(strange.split())))
    mixed = writer.some([*words, other], 4)
    question = writer.ask(ODD[language], l=("、" if language == "zh" else ", ").join(mixed))
    reply = (
        f"{other}不同类，其他的都是{name}。"
        if language == "zh"
        else f"{other.capitalize()}: each of the others is {name}."
    )
    return Dialogue((question, reply), {"first": [other, *words]})


def why(writer: Writer, language: str) -> Dialogue:
    question, answer, words = writer.one(WHY[language])
    return Dialogue((writer.ask(ASK_WHY[language], w=question), answer), {"all": [words.split("|")]})


SKILL = Skill(
    "reasoning",
    [
        (2, order),
        (1, pair),
        (1.5, is_a),
        (1, syllogism),
        (1.5, sequence),
        (1, days),
        (1, compare),
        (1.5, odd),
        (1.5, why),
    ],
)
