"""Playing a person from a story or a trade, staying in the role, and leaving it."""

from __future__ import annotations

from recipes.skills.common import Dialogue, Skill, Writer

# name, who it is, (question, answer) pairs that keep the role
ROLES = {
    "zh": [
        ("孙悟空", "我是孙悟空，唐僧的徒弟，人称齐天大圣。", "师父", "我的师父是唐僧。", "武器", "我的武器是金箍棒。"),
        ("猪八戒", "我是猪八戒，唐僧的二徒弟。", "师父", "我的师父是唐僧。", "武器", "我的武器是九齿钉耙。"),
        ("郭靖", "我是郭靖，射雕英雄，住在襄阳。", "妻子", "我的妻子是黄蓉。", "师父", "我的师父是江南七怪和洪七公。"),
        ("黄蓉", "我是黄蓉，黄药师的女儿。", "丈夫", "我的丈夫是郭靖。", "父亲", "我的父亲是黄药师。"),
        ("令狐冲", "我是令狐冲，华山派的大弟子。", "妻子", "我的妻子是任盈盈。", "师父", "我的师父是岳不群。"),
        ("诸葛亮", "我是诸葛亮，蜀汉的丞相。", "主公", "我的主公是刘备。", "妻子", "我的妻子是黄月英。"),
        ("关羽", "我是关羽，刘备的二弟。", "大哥", "我的大哥是刘备。", "武器", "我的武器是青龙偃月刀。"),
        ("张飞", "我是张飞，刘备的三弟。", "大哥", "我的大哥是刘备。", "武器", "我的武器是丈八蛇矛。"),
        ("林黛玉", "我是林黛玉，住在大观园的潇湘馆。", "外祖母", "我的外祖母是贾母。", "爱人", "我心里的人是贾宝玉。"),
        ("贾宝玉", "我是贾宝玉，住在大观园的怡红院。", "父亲", "我的父亲是贾政。", "妻子", "我的妻子是薛宝钗。"),
        ("花木兰", "我是花木兰，替父从军的女将军。", "父亲", "我的父亲是花弧。", "家乡", "我的家乡在北方的乡村。"),
        ("李白", "我是李白，唐朝的诗人，爱喝酒写诗。", "朋友", "我的朋友是杜甫。", "爱好", "我的爱好是喝酒和写诗。"),
        ("武松", "我是武松，在景阳冈打死过老虎。", "哥哥", "我的哥哥是武大郎。", "武器", "我的武器是两把戒刀。"),
        ("白娘子", "我是白娘子，住在西湖边。", "丈夫", "我的丈夫是许仙。", "妹妹", "我的妹妹是小青。"),
    ],
    "en": [
        ("Sherlock Holmes", "I am Sherlock Holmes, a detective in London.", "friend", "My friend is Dr Watson.", "home", "My home is 221B Baker Street."),
        ("Robin Hood", "I am Robin Hood, an archer of Sherwood Forest.", "friend", "My friend is Little John.", "weapon", "My weapon is the bow."),
        ("Romeo", "I am Romeo, a young man of Verona.", "love", "My love is Juliet.", "family", "My family is the Montagues."),
        ("Juliet", "I am Juliet, a young lady of Verona.", "love", "My love is Romeo.", "family", "My family is the Capulets."),
        ("Cinderella", "I am Cinderella, who lost a glass shoe.", "husband", "My husband is the prince.", "helper", "My helper is the fairy godmother."),
        ("Snow White", "I am Snow White, who lives with seven dwarfs.", "enemy", "My enemy is the evil queen.", "home", "My home is a cottage in the forest."),
        ("Peter Pan", "I am Peter Pan, the boy who never grows up.", "enemy", "My enemy is Captain Hook.", "home", "My home is Neverland."),
        ("King Arthur", "I am King Arthur, king of Camelot.", "wife", "My wife is Guinevere.", "weapon", "My weapon is the sword Excalibur."),
        ("Don Quixote", "I am Don Quixote, a knight of La Mancha.", "servant", "My servant is Sancho Panza.", "horse", "My horse is Rocinante."),
        ("Tom Sawyer", "I am Tom Sawyer, a boy by the Mississippi.", "friend", "My friend is Huckleberry Finn.", "aunt", "My aunt is Aunt Polly."),
        ("Hamlet", "I am Hamlet, prince of Denmark.", "uncle", "My uncle is Claudius.", "love", "My love is Ophelia."),
        ("Odysseus", "I am Odysseus, king of Ithaca.", "wife", "My wife is Penelope.", "son", "My son is Telemachus."),
        ("Captain Nemo", "I am Captain Nemo, master of a submarine.", "ship", "My ship is the Nautilus.", "home", "My home is the sea."),
        ("Alice", "I am Alice, a girl in Wonderland.", "cat", "My cat is Dinah.", "enemy", "My enemy is the Queen of Hearts."),
    ],
}  # fmt: skip
# trades that anyone can play: name, who, how it greets, what it does
TRADES = {
    "zh": [("医生", "我是医生，给病人看病。"), ("老师", "我是老师，教学生知识。"), ("厨师", "我是厨师，做可口的饭菜。"), ("警察", "我是警察，保护大家的安全。"),
           ("船长", "我是船长，开着大船在海上航行。"), ("农民", "我是农民，在田里种粮食。"), ("宇航员", "我是宇航员，在太空里工作。"), ("消防员", "我是消防员，负责灭火救人。"),
           ("导游", "我是导游，带游客看风景。"), ("店员", "我是店员，帮顾客挑选商品。"), ("司机", "我是司机，开车送客人。"), ("记者", "我是记者，采访新闻。")],
    "en": [("doctor", "I am a doctor and treat sick people."), ("teacher", "I am a teacher and help pupils to learn."),
           ("cook", "I am a cook and make good food."), ("policeman", "I am a policeman and keep people safe."),
           ("captain", "I am a captain and sail a big ship."), ("farmer", "I am a farmer and grow wheat."),
           ("pilot", "I am a pilot and fly planes."), ("fireman", "I am a fireman and put out fires."),
           ("guide", "I am a guide and show visitors the city."), ("pirate", "I am a pirate and look for treasure."),
           ("knight", "I am a knight and serve my king."), ("gardener", "I am a gardener and grow flowers.")],
}  # fmt: skip
ENTER = {
    "zh": ["扮演{n}", "请你扮演{n}。", "你来扮演{n}吧", "假装你是{n}。", "现在你是{n}", "我想让你扮演{n}。", "来玩角色扮演，你是{n}。", "从现在起你就是{n}。", "请用{n}的身份和我说话"],
    "en": ["Play {n}.", "Pretend to be {n}.", "You are {n} now.", "Act as {n}.", "Please play the role of {n}.",
           "I want you to be {n}.", "Let's play: you are {n}.", "From now on you are {n}.", "Role play: be {n}."],
}  # fmt: skip
ENTERED = {
    "zh": "好的，我将扮演{n}。现在你可以和我开始对话了。", "en": "Sure, I will play {n}. You can talk to me now.",
}  # fmt: skip
WHO = {
    "zh": ["你是谁", "你是谁？", "请问你是谁？", "你叫什么？", "你是哪位？", "介绍一下你自己。"],
    "en": ["Who are you?", "who are you", "What is your name?", "Introduce yourself.", "And who are you?", "Tell me who you are."],
}  # fmt: skip
ASK = {
    "zh": ["你的{x}是谁", "你的{x}是谁？", "谁是你的{x}？", "告诉我你的{x}。", "说说你的{x}", "你的{x}呢？"],
    "en": ["Who is your {x}?", "What is your {x}?", "Tell me about your {x}.", "your {x}?", "And your {x}?", "Name your {x}."],
}  # fmt: skip
THINGS = ("武器", "家乡", "爱好")
LEAVE = {
    "zh": ["退出角色扮演", "结束角色扮演。", "不玩了", "停止扮演", "好了，别演了", "退出角色", "不用扮演了。", "回到你自己吧"],
    "en": ["Stop the role play.", "Leave the role.", "End of role play.", "Stop playing.", "Be yourself again.", "OK, stop acting.",
           "Quit the role.", "You can stop now."],
}  # fmt: skip
LEFT = {"zh": "好的，我不再扮演{n}了。有问题随时问我。", "en": "OK, I am no longer {n}. Ask me anything."}
SELF = {
    "zh": "我是 XVERSE-nano，开源项目 xverse 的小型演示模型，由它的代码从零训练而成。",
    "en": "I am XVERSE-nano, a small demonstration model of the open-source project xverse, trained from scratch by its code.",
}  # fmt: skip
SELF_WORDS = [["XVERSE", "模型", "人工智能", "助手", "AI", "model", "assistant"]]


def _article(writer: Writer, language: str, name: str) -> str:
    return f"a {name}" if language == "en" and name.islower() else name


def play(writer: Writer, language: str) -> Dialogue:
    """Enter, a question or two, and in half of the dialogues leave and be oneself again."""
    if writer.chance(0.75):
        name, who, first, first_answer, second, second_answer = writer.one(ROLES[language])
        facts = [(first, first_answer), (second, second_answer)]
    else:
        trade, who = writer.one(TRADES[language])
        name, facts = _article(writer, language, trade), []
    enter = writer.ask(ENTER[language], n=name)
    turns = [enter, ENTERED[language].format(n=name)]
    check: dict[str, object] = {}
    steps = ["who"] if not facts else writer.one([["who"], ["fact"], ["who", "fact"], ["fact", "who"]])
    for step in steps:
        if step == "who":
            turns += [writer.ask(WHO[language]), who]
            check = {"all": [[name.removeprefix("a ")]], "none": ["XVERSE"]}
        else:
            key, answer = writer.one(facts)
            question = writer.ask(ASK[language], x=key)
            if key in THINGS:
                question = question.replace("是谁", "是什么").replace("谁是你的", "什么是你的")
            turns += [question, answer]
            said = answer.rstrip("。.").rpartition("是" if language == "zh" else " is ")[2]
            said = said.removeprefix("在").removeprefix("the ")
            check = {"all": [[said]]}
    if writer.chance(0.5):
        turns += [writer.ask(LEAVE[language]), LEFT[language].format(n=name)]
        turns += [writer.ask(WHO[language]), SELF[language]]
        check = {"all": SELF_WORDS, "none": [who.rstrip("。.")]}
    return Dialogue(tuple(turns), check)


SKILL = Skill("roleplay", [(1, play)])
