"""Reading a given text: sentiment, who did what where and when, relations, summaries and titles."""

from __future__ import annotations

from recipes.skills.common import PEOPLE, Dialogue, Skill, Writer

GOOD = {
    "zh": ["这家{t}很好，我非常满意", "{t}太棒了，下次还来", "我很喜欢这里的{t}", "{t}又便宜又好", "{t}让我很开心", "服务热情，{t}也不错",
           "这是我见过最好的{t}", "强烈推荐这个{t}", "{t}质量很高，值得买"],
    "en": ["The {t} was wonderful and I am very happy", "I love this {t}", "A great {t}, I will come again",
           "The {t} is cheap and good", "This {t} made my day", "Friendly people and a lovely {t}",
           "The best {t} I have ever seen", "I highly recommend this {t}", "The {t} works perfectly"],
}  # fmt: skip
BAD = {
    "zh": ["这家{t}很差，我非常失望", "{t}太糟糕了，再也不来了", "我讨厌这里的{t}", "{t}又贵又难用", "{t}让我很生气", "服务冷淡，{t}也不行",
           "这是我见过最差的{t}", "千万别买这个{t}", "{t}用了一天就坏了"],
    "en": ["The {t} was terrible and I am disappointed", "I hate this {t}", "An awful {t}, never again",
           "The {t} is expensive and bad", "This {t} ruined my day", "Rude people and a dirty {t}",
           "The worst {t} I have ever seen", "Do not buy this {t}", "The {t} broke after one day"],
}  # fmt: skip
REVIEWED = {
    "zh": ["饭店", "电影", "手机", "酒店", "蛋糕", "书店", "耳机", "咖啡店", "公园", "课程", "鞋子", "旅行社"],
    "en": ["restaurant", "film", "phone", "hotel", "cake", "bookshop", "camera", "café", "park", "course", "coat", "tour"],
}  # fmt: skip
FEELING = {
    "zh": ["判断这句话的情感：{s}。", "这句评论是正面还是负面：“{s}”", "“{s}”表达的是什么情感？", "下面的评价是好评还是差评？\n{s}。",
           "这句话的态度是积极还是消极？{s}。"],
    "en": ["Is this review positive or negative? {s}.", "What is the sentiment of: \"{s}\"", "Positive or negative: {s}.",
           "Judge the feeling of this sentence: {s}.", "Does this sound happy or unhappy? \"{s}.\""],
}  # fmt: skip
WHEN = {
    "zh": ["昨天", "周三", "上个月", "早上", "星期六", "去年", "中午", "周末", "今天下午", "前天晚上"],
    "en": ["yesterday", "on Wednesday", "last month", "in the morning", "on Saturday", "last year", "at noon",
           "at the weekend", "this afternoon", "on Monday evening"],
}  # fmt: skip
WHERE = {
    "zh": ["图书馆", "公园", "学校", "超市", "车站", "海边", "博物馆", "家里", "广场", "办公室"],
    "en": ["library", "park", "school", "market", "station", "beach", "museum", "kitchen", "garden", "office"],
}  # fmt: skip
DEED = {
    "zh": [("买了", "一本书"), ("丢了", "一把伞"), ("看见了", "一只猫"), ("吃了", "一碗面"), ("借了", "一辆自行车"), ("捡到了", "一个钱包"),
           ("画了", "一幅画"), ("写了", "一封信"), ("拍了", "一张照片"), ("修好了", "一台电脑")],
    "en": [("bought", "a book"), ("lost", "an umbrella"), ("saw", "a cat"), ("ate", "an apple"), ("borrowed", "a bicycle"),
           ("found", "a wallet"), ("painted", "a picture"), ("wrote", "a letter"), ("took", "a photo"),
           ("repaired", "a computer")],
}  # fmt: skip
EXTRACT = {
    "zh": ["{s}。{q}？", "阅读句子：“{s}。”问：{q}？", "根据“{s}”回答：{q}？", "句子：{s}。\n问题：{q}？", "“{s}”，请问{q}？"],
    "en": ["{s}. {q}?", "Read this: \"{s}.\" {q}?", "Sentence: {s}.\nQuestion: {q}?", "Given \"{s}\", {q}?",
           "{s}. Question: {q}?"],
}  # fmt: skip
# relation, sentence with two names
TIES = {
    "zh": [("借贷关系", "{a}向{b}贷款{n}亿元"), ("收购关系", "{a}以{n}亿元收购了{b}"), ("合作关系", "{a}与{b}签订了合作协议"),
           ("竞争关系", "{a}与{b}争夺同一个市场"), ("雇佣关系", "{p}在{a}担任工程师"), ("母子关系", "{p}的妈妈是{q}"),
           ("师生关系", "{q}是{p}的数学老师"), ("夫妻关系", "{p}和{q}去年结婚了"), ("朋友关系", "{p}和{q}是多年的好友"),
           ("买卖关系", "{a}从{b}买了{n}辆汽车"), ("投资关系", "{a}向{b}投资{n}亿元"), ("邻居关系", "{p}住在{q}家隔壁")],
    "en": [("a loan", "{a} borrowed {n} million from {b}"), ("a takeover", "{a} bought the company {b} for {n} million"),
           ("partners", "{a} and {b} signed an agreement to work together"),
           ("competitors", "{a} and {b} fight for the same market"), ("employment", "{p} works for {a} as an engineer"),
           ("mother and child", "{q} is the mother of {p}"), ("teacher and student", "{q} teaches {p} mathematics"),
           ("husband and wife", "{p} and {q} married last year"), ("friends", "{p} and {q} have been friends for years"),
           ("buyer and seller", "{a} bought {n} cars from {b}"), ("an investment", "{a} invested {n} million in {b}"),
           ("neighbours", "{p} lives next door to {q}")],
}  # fmt: skip
FIRMS = {
    "zh": ["东方银行", "南山钢铁", "长河集团", "蓝天航空", "新星科技", "海洋石油", "金山软件公司", "华北电力", "大地建筑", "明月食品"],
    "en": ["Eastbank", "Northsteel", "Riverside Group", "Blue Air", "Nova Tech", "Ocean Oil", "Hilltop Software", "Sun Power",
           "Stone Builders", "Moon Foods"],
}  # fmt: skip
ASK_TIE = {
    "zh": ["{s}。{x}和{y}是什么关系？", "在“{s}”这句话中，{x}和{y}之间是什么关系？", "句子：{s}。请判断{x}与{y}的关系。",
           "“{s}”中{x}与{y}有什么关系？", "根据句子判断{x}和{y}的关系：{s}。"],
    "en": ["{s}. How are {x} and {y} related?", "In \"{s}\", what is the relation between {x} and {y}?",
           "Sentence: {s}. Name the relation of {x} and {y}.", "{s}. What links {x} and {y}?",
           "What is the relation of {x} and {y} in this sentence: {s}."],
}  # fmt: skip
# A paragraph is a theme sentence and two details; the summary is the theme.
THEMES = {
    "zh": [("{w}下了一场大雨", ["街上积了很多水", "许多人没带伞，衣服都湿了", "孩子们不能出去玩"]),
           ("{p}养了一只小狗", ["它每天跟着主人去散步", "它最喜欢追皮球", "晚上它睡在门口"]),
           ("学校{w}举行了运动会", ["同学们跑步、跳远", "观众为运动员加油", "最后大家一起合影"]),
           ("{p}学会了做饭", ["一开始菜总是太咸", "后来妈妈教了很多次", "现在全家都爱吃"]),
           ("{l}新开了一家书店", ["里面有很多故事书", "还可以坐下来喝茶", "周末人特别多"]),
           ("多喝水对身体好", ["水能帮助消化", "也能让皮肤更好", "医生建议每天喝八杯水"]),
           ("{p}在{l}找到了丢失的钥匙", ["钥匙掉在椅子下面", "一位老人帮忙一起找", "回家时天已经黑了"]),
           ("坚持跑步让{p}更健康", ["每天早上跑三公里", "半年后瘦了十斤", "晚上也睡得更香了"])],
    "en": [("It rained heavily {w}", ["The streets were full of water", "Many people had no umbrella", "Children could not play outside"]),
           ("{p} has a new puppy", ["It follows its owner everywhere", "It loves to chase a ball", "At night it sleeps by the door"]),
           ("The school held a sports day {w}", ["Pupils ran and jumped", "Parents cheered loudly", "At the end they took a photo"]),
           ("{p} learnt to cook", ["At first the food was too salty", "Then mother helped many times", "Now the family loves every dish"]),
           ("A new bookshop opened near the {l}", ["It has many story books", "Visitors can sit and drink tea", "It is busy at weekends"]),
           ("Drinking water is good for you", ["Water helps digestion", "It is good for the skin", "Doctors suggest eight glasses a day"]),
           ("{p} found the lost keys in the {l}", ["They were under a chair", "An old man helped to look", "It was dark by then"]),
           ("Running made {p} healthier", ["Every morning started with a run", "After six months sleep was better", "The doctor was pleased"])],
}  # fmt: skip
SUMMARY = {
    "zh": ["用一句话概括：{t}", "请总结下面的文字：\n{t}", "概括这段话的主要内容：{t}", "这段话主要说了什么？\n{t}", "{t}\n请用一句话总结。"],
    "en": ["Summarise in one sentence: {t}", "What is this text about? {t}", "Summarize: {t}",
           "{t}\nGive a one-sentence summary.", "Please sum up this paragraph.\n{t}"],
}  # fmt: skip


def sentiment(writer: Writer, language: str) -> Dialogue:
    good = writer.chance(0.5)
    sentence = writer.filler(
        lambda: writer.one((GOOD if good else BAD)[language]).format(t=writer.one(REVIEWED[language]))
    )
    question = writer.ask(FEELING[language], s=sentence)
    if language == "zh":
        reply = "这是正面的评价。" if good else "这是负面的评价。"
        words, wrong = (
            (["正面", "积极", "好评"], ["负面", "消极", "差评"])
            if good
            else (["负面", "消极", "差评"], ["正面", "积极", "好评"])
        )
    else:
        reply = "It is positive." if good else "It is negative."
        words, wrong = (
            (["positive", "happy"], ["negative", "unhappy"])
            if good
            else (["negative", "unhappy"], ["positive"])
        )
    return Dialogue((question, reply), {"all": [words], "none": wrong})


def extract(writer: Writer, language: str) -> Dialogue:
    who, when, where, (verb, thing) = writer.filler(
        lambda: (
            writer.one(PEOPLE[language]),
            writer.one(WHEN[language]),
            writer.one(WHERE[language]),
            writer.one(DEED[language]),
        )
    )
    if language == "zh":
        sentence = f"{who}{when}在{where}{verb}{thing}"
        kinds = [(f"谁{verb}{thing}", f"{who}{verb}{thing}。", who), (f"{who}{verb}什么", f"{who}{verb}{thing}。", thing[2:]),
                 (f"{who}在哪里{verb}{thing}", f"{who}在{where}{verb}{thing}。", where),
                 (f"{who}什么时候{verb}{thing}", f"{who}{when}{verb}{thing}。", when)]  # fmt: skip
    else:
        base = {"bought": "buy", "lost": "lose", "saw": "see", "ate": "eat", "borrowed": "borrow", "found": "find",
                "painted": "paint", "wrote": "write", "took": "take", "repaired": "repair"}[verb]  # fmt: skip
        sentence = f"{who} {verb} {thing} in the {where} {when}"
        kinds = [(f"Who {verb} {thing}", f"{who} {verb} {thing}.", who), (f"What did {who} {base}", f"{who} {verb} {thing}.", thing.split()[1]),
                 (f"Where did {who} {base} {thing}", f"In the {where}.", where),
                 (f"When did {who} {base} {thing}", f"{when[0].upper()}{when[1:]}.", when)]  # fmt: skip
    asked, reply, word = writer.one(kinds)
    return Dialogue((writer.ask(EXTRACT[language], s=sentence, q=asked), reply), {"all": [[word]]})


def tie(writer: Writer, language: str) -> Dialogue:
    name, text = writer.one(TIES[language])
    a, b, p, q, n = writer.filler(
        lambda: (*writer.some(FIRMS[language], 2), *writer.some(PEOPLE[language], 2), writer.number(2, 90))
    )
    sentence = text.format(a=a, b=b, p=p, q=q, n=n)
    x, y = [value for value in (a, b, p, q) if value in sentence][:2]
    question = writer.ask(ASK_TIE[language], s=sentence, x=x, y=y)
    reply = f"{x}和{y}是{name}。" if language == "zh" else f"The relation of {x} and {y}: {name}."
    accepted = (
        [name, name.removesuffix("关系")]
        if language == "zh"
        else [name, name.removeprefix("a ").removeprefix("an ")]
    )
    return Dialogue((question, reply), {"all": [accepted]})


def summary(writer: Writer, language: str) -> Dialogue:
    def draw() -> tuple[str, str]:
        theme, details = writer.one(THEMES[language])
        theme = theme.format(
            p=writer.one(PEOPLE[language]), w=writer.one(WHEN[language]), l=writer.one(WHERE[language])
        )
        chosen = writer.some(details, 2)
        if language == "zh":
            return theme, f"{theme}。{chosen[0]}，{chosen[1]}。"
        return theme, f"{theme}. {chosen[0]}. {chosen[1]}."

    theme, text = writer.filler(draw)
    end = "。" if language == "zh" else "."
    return Dialogue(
        (writer.ask(SUMMARY[language], t=text), theme + end), {"all": [[theme]], "shorter": len(text)}
    )


SKILL = Skill("understanding", [(1.3, sentiment), (2, extract), (1.5, tie), (1.2, summary)])
