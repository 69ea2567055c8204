"""Short texts: stories from three words, poems, jokes, lists, plans of days, notes."""

from __future__ import annotations

from recipes.skills.common import Dialogue, Skill, Writer, chat

HEROES = {
    "zh": ["小猫", "小狗", "兔子", "老爷爷", "小女孩", "小男孩", "渔夫", "农夫", "公主", "狐狸", "小熊", "机器人", "老师", "猴子", "乌龟", "画家"],
    "en": ["cat", "dog", "rabbit", "girl", "boy", "fisherman", "farmer", "princess", "fox", "bear", "robot", "teacher",
           "monkey", "turtle", "king", "bird"],
}  # fmt: skip
PLACES = {
    "zh": ["森林", "海边", "山顶", "村子", "城堡", "花园", "小岛", "雪地", "河边", "学校", "果园", "草原"],
    "en": ["forest", "beach", "mountain", "village", "castle", "garden", "island", "desert", "river", "school", "orchard", "cave"],
}  # fmt: skip
OBJECTS = {
    "zh": ["钥匙", "宝石", "雨伞", "地图", "苹果", "信", "灯笼", "帽子", "种子", "铃铛", "镜子", "红气球", "面包", "风筝"],
    "en": ["key", "stone", "umbrella", "map", "apple", "letter", "lantern", "hat", "seed", "bell", "mirror", "balloon",
           "cake", "kite"],
}  # fmt: skip
STORY = {
    "zh": ["用“{a}、{b}、{c}”写一个小故事。", "写一个故事，要有{a}、{b}和{c}。", "请用{a}、{b}、{c}三个词编一个短故事", "讲一个关于{a}、{b}和{c}的故事。",
           "编一个故事，里面出现{a}、{b}、{c}。", "以{a}、{b}、{c}为内容写个小故事", "故事里要有这三个词：{a}，{b}，{c}。", "给我讲个有{a}、{b}、{c}的故事吧。"],
    "en": ["Write a short story with the words {a}, {b} and {c}.", "Tell a story about a {a}, a {b} and a {c}.",
           "Make up a story that has {a}, {b} and {c} in it.", "Write a tiny story using {a}, {b}, {c}.",
           "Use these three words in a story: {a}, {b}, {c}.", "Please write a story with {a}, {b}, {c}.",
           "I want a story with a {a}, a {b} and a {c}.", "Story words: {a}, {b}, {c}. Write it."],
}  # fmt: skip
ABOUT = {
    "zh": ["写一个关于{a}的故事。", "讲一个{a}的故事", "讲个{a}的故事吧", "给我讲一个关于{a}的故事。", "编一个{a}的小故事。", "我想听{a}的故事。"],
    "en": ["Write a story about a {a}.", "Tell me a story about a {a}.", "Tell a short story about a {a}.",
           "I would like a story about a {a}.", "Make up a story about a {a}.", "Story about a {a}, please."],
}  # fmt: skip
BEGIN = {
    "zh": ["从前，{b}有一{m}{a}。", "很久以前，一{m}{a}住在{b}。", "一天早上，一{m}{a}来到{b}。"],
    "en": ["Once there was a {a} near the {b}.", "Long ago, a {a} lived by the {b}.", "One morning, a {a} came to the {b}."],
}  # fmt: skip
MIDDLE = {
    "zh": ["有一天，{a}发现了一{n}{c}。", "在路上，{a}捡到一{n}{c}。", "{a}看见地上有一{n}{c}。"],
    "en": ["One day the {a} found a {c}.", "On the way, the {a} saw a {c} on the ground.", "There the {a} picked up a {c}."],
}  # fmt: skip
TURN = {
    "zh": ["原来那是一位老奶奶丢的，{a}就还给了她。", "大家都想要它，{a}却决定和朋友分享。", "天忽然黑了，它帮{a}找到了回家的路。", "{a}很好奇，小心地把它带回了家。"],
    "en": ["An old woman had lost it, so the {a} gave it back.", "Everyone wanted it, but the {a} shared it with a friend.",
           "It grew dark, and it helped the {a} to find the way home.", "The {a} was curious and carried it home with care."],
}  # fmt: skip
FINISH = {
    "zh": ["从此，{a}有了许多朋友。", "那天晚上，{a}开心地睡着了。", "{a}明白了：帮助别人最快乐。", "大家都夸{a}聪明又善良。"],
    "en": ["From then on, the {a} had many friends.", "That night the {a} fell asleep happily.",
           "The {a} learnt that helping others is a joy.", "Everyone said that the {a} was kind and clever."],
}  # fmt: skip
PERSONS = ("老爷爷", "小女孩", "小男孩", "渔夫", "农夫", "公主", "老师", "画家")
MEASURE = {"钥匙": "把", "宝石": "颗", "雨伞": "把", "地图": "张", "苹果": "个", "信": "封", "灯笼": "盏", "帽子": "顶", "种子": "颗",
           "铃铛": "个", "镜子": "面", "红气球": "个", "面包": "块", "风筝": "只"}  # fmt: skip
# theme: verses (any two lines of two pairs make a poem)
POEMS = {
    "zh": {
        "春天": ["春风吹绿了柳树，", "花儿笑开了脸庞。", "燕子飞回旧时的家，", "田野充满了希望。"], "夏天": ["荷花开满了池塘，", "蝉在树上歌唱。", "孩子跳进清凉的水，", "笑声传到远方。"],
        "冬天": ["雪花轻轻落下，", "大地穿上白衣。", "炉火暖着小屋，", "我们讲着故事。"], "月亮": ["月亮挂在天上，", "照着安静的村庄。", "远方的人啊，", "你是否也在张望？"],
        "大海": ["大海一片蔚蓝，", "浪花拍打着沙滩。", "白帆慢慢远去，", "带走我的思念。"], "雨": ["细雨落在窗前，", "像一首轻轻的歌。", "小草喝饱了水，", "悄悄换上新色。"],
        "母亲": ["您的手温暖如春，", "您的话照亮我心。", "无论我走到哪里，", "都记得您的爱。"], "星星": ["星星眨着眼睛，", "悄悄看着大地。", "我数了一颗又一颗，", "慢慢进入梦里。"],
        "花": ["一朵小花开在路旁，", "没有人知道它的名字。", "它对着太阳微笑，", "把香气送给大家。"], "故乡": ["小河绕着村庄，", "炊烟升上天空。", "离家的日子里，", "故乡常在梦中。"],
    },
    "en": {
        "spring": ["Soft winds wake the sleeping trees,", "Flowers nod to busy bees,", "Birds come home across the sky,", "And winter waves a last goodbye."],
        "summer": ["The days are long, the sky is blue,", "The grass is bright with morning dew,", "We run and laugh beside the stream,", "And sleep at night in a golden dream."],
        "winter": ["The snow falls softly on the hill,", "The river sleeps, the woods are still,", "We sit beside the fire's glow,", "And watch the silent flakes of snow."],
        "the moon": ["The moon looks down with silver light,", "She walks alone across the night,", "She paints the roofs and fields with white,", "And tells the sleepy world good night."],
        "rain": ["The rain is tapping on the pane,", "It sings its soft and old refrain,", "The thirsty garden drinks its fill,", "And clouds move on across the hill."],
        "the stars": ["The stars are lamps so far and high,", "They tell old stories in the sky,", "I count them slowly, one by one,", "And dream until the night is done."],
        "friendship": ["A friend will walk with you in rain,", "And share your joy and ease your pain,", "Through all the seasons, near or far,", "A friend is like a guiding star."],
        "a cat": ["My cat sleeps warmly in the sun,", "She dreams of mice that jump and run,", "She wakes and stretches, soft and slow,", "Then hunts a leaf that dances low."],
        "a tree": ["The old tree spreads its arms up high,", "It holds the birds, it holds the sky,", "It gives us shade on summer days,", "And whispers in its quiet ways."],
        "home": ["A little lamp, an open door,", "A cat that sleeps upon the floor,", "However far my feet may roam,", "My heart will find the way back home."],
    },
}  # fmt: skip
POEM = {
    "zh": ["写一首关于{t}的诗。", "写一首{t}的小诗", "请以{t}为题写一首诗", "来一首写{t}的诗", "帮我写首关于{t}的诗。", "作一首诗，主题是{t}。"],
    "en": ["Write a poem about {t}.", "Write me a few verses about {t}.", "A poem about {t}, please.",
           "Can you write a poem about {t}?", "Compose a poem on {t}.", "I want a poem about {t}."],
}  # fmt: skip
JOKES = {
    "zh": ["老师问：“谁能用‘果然’造句？”小明说：“先吃水果，然后喝水。”", "小明对妈妈说：“我考了第二名。”妈妈问：“全班几个人？”小明说：“两个。”",
           "医生说：“你要多运动。”病人说：“我每天都跑——跑去冰箱。”", "问：什么车没有轮子？答：风车。", "一只蜗牛对另一只说：“你跑慢点，我追不上！”",
           "问：什么门关不上？答：球门。", "爸爸问：“电视怎么不响了？”小明说：“它累了，我让它休息。”", "顾客说：“这汤里有只苍蝇！”服务员说：“别急，它喝得不多。”",
           "问：什么东西越洗越脏？答：水。", "小红问：“鱼为什么不说话？”小明说：“因为水里不方便张嘴。”"],
    "en": ["Why did the scarecrow win a prize? It was outstanding in its field.", "What has hands but cannot clap? A clock.",
           "Why did the book look sad? It had too many problems: it was a maths book.",
           "What do you call a bear without teeth? A gummy bear.", "Why can't a bicycle stand alone? It is two-tired.",
           "What did one wall say to the other? I'll meet you at the corner.",
           "Why was six afraid of seven? Because seven ate nine.", "What goes up and never comes down? Your age.",
           "Why did the student eat his homework? The teacher said it was a piece of cake.",
           "What is full of holes but holds water? A sponge."],
}  # fmt: skip
JOKE = {
    "zh": ["讲一个笑话。", "说个笑话吧", "给我讲个笑话听听", "来个笑话", "你会讲笑话吗？讲一个。", "我想听笑话。", "逗我笑一下。", "再讲一个笑话吧"],
    "en": ["Tell a joke.", "Tell me something funny.", "Do you know a joke?", "I want to hear a joke.", "Make me laugh.",
           "A joke, please.", "Can you tell me a joke?", "Say something funny."],
}  # fmt: skip
LISTS = {
    "zh": {"水果": "苹果 香蕉 梨 橘子 葡萄 西瓜 草莓", "动物": "猫 狗 牛 羊 兔子 老虎 大象", "颜色": "红色 蓝色 绿色 黄色 白色 黑色 紫色",
           "蔬菜": "白菜 萝卜 土豆 西红柿 黄瓜 菠菜 茄子", "运动": "跑步 游泳 足球 篮球 乒乓球 羽毛球 骑车", "国家": "中国 法国 日本 德国 英国 俄罗斯 巴西",
           "城市": "北京 上海 广州 深圳 成都 西安 杭州", "乐器": "钢琴 吉他 小提琴 二胡 笛子 鼓 古筝", "职业": "医生 老师 司机 厨师 警察 农民 画家",
           "花": "玫瑰 菊花 荷花 梅花 兰花 牡丹 百合", "饮料": "水 茶 咖啡 牛奶 果汁 豆浆 汽水", "交通工具": "汽车 火车 飞机 轮船 自行车 地铁 公共汽车"},
    "en": {"fruits": "apple banana pear orange grape melon cherry", "animals": "cat dog cow sheep rabbit tiger elephant",
           "colours": "red blue green yellow white black purple", "vegetables": "carrot potato onion tomato cabbage bean pea",
           "sports": "running swimming football basketball tennis cycling skiing", "countries": "China France Japan Germany Spain Russia Brazil",
           "cities": "Beijing Paris London Tokyo Berlin Rome Madrid", "instruments": "piano guitar violin drum flute trumpet harp",
           "jobs": "doctor teacher driver cook farmer nurse painter", "flowers": "rose lily tulip daisy violet sunflower orchid",
           "drinks": "water tea coffee milk juice cocoa lemonade", "vehicles": "car train plane ship bicycle bus tram"},
}  # fmt: skip
LIST = {
    "zh": ["列出{n}种{t}。", "说出{n}个{t}", "请列举{n}个{t}。", "给我{n}个{t}的例子", "写{n}个{t}的名字。", "举出{n}个{t}"],
    "en": ["List {n} {t}.", "Name {n} {t}.", "Give me {n} {t}.", "Write down {n} {t}.", "Can you list {n} {t}?",
           "I need the names of {n} {t}."],
}  # fmt: skip
COUNTS = {"zh": {2: "两", 3: "三", 4: "四", 5: "五"}, "en": {2: "two", 3: "three", 4: "four", 5: "five"}}
SIGHTS = {
    "zh": {"北京": "故宫 长城 天坛 颐和园 天安门广场 北海公园", "上海": "外滩 豫园 南京路 东方明珠 上海博物馆 田子坊", "西安": "兵马俑 大雁塔 城墙 钟楼 回民街 华清池",
           "杭州": "西湖 灵隐寺 雷峰塔 西溪湿地 河坊街 六和塔", "广州": "广州塔 陈家祠 沙面 白云山 越秀公园 珠江", "成都": "宽窄巷子 熊猫基地 武侯祠 锦里 杜甫草堂 青城山",
           "南京": "中山陵 夫子庙 明孝陵 玄武湖 总统府 城墙", "巴黎": "埃菲尔铁塔 卢浮宫 凯旋门 圣母院 塞纳河 凡尔赛宫", "东京": "浅草寺 东京塔 上野公园 银座 皇居 涩谷",
           "苏州": "拙政园 虎丘 平江路 狮子林 寒山寺 金鸡湖"},
    "en": {"Beijing": "the Palace Museum|the Great Wall|the Temple of Heaven|the Summer Palace|Beihai Park|Tiananmen Square",
           "London": "the Tower|the British Museum|Hyde Park|Westminster|Tower Bridge|Camden Market",
           "Paris": "the Louvre|the Eiffel Tower|Notre-Dame|the Seine|Montmartre|Versailles",
           "Rome": "the Colosseum|the Forum|the Pantheon|the Trevi Fountain|the Vatican|Villa Borghese",
           "Tokyo": "Senso-ji|Ueno Park|Ginza|Tokyo Tower|Shibuya|the Imperial Palace",
           "Berlin": "the Brandenburg Gate|Museum Island|the Reichstag|Tiergarten|the East Side Gallery|the Zoo",
           "New York": "Central Park|Times Square|the Statue of Liberty|Brooklyn Bridge|the Met|Broadway",
           "Madrid": "the Prado|Retiro Park|the Royal Palace|Plaza Mayor|Gran Vía|the Reina Sofía"},
}  # fmt: skip
PLAN = {
    "zh": ["我要去{c}玩{n}天，帮我安排一下。", "帮我制定{c}{n}日游计划", "请写一份{c}{n}天的旅行计划。", "{c}{n}日游怎么安排？", "去{c}旅游{n}天，有什么计划？", "给我一个{c}{n}日游的行程"],
    "en": ["Plan {n} days in {c}.", "I am going to {c} for {n} days. Make a plan.", "Write a {n}-day plan for {c}.",
           "What should I do in {c} in {n} days?", "Please plan a trip of {n} days to {c}.", "Make me a {n}-day itinerary for {c}."],
}  # fmt: skip
MEALS = {
    "zh": ["吃当地小吃", "在老街吃饭", "逛夜市", "早点休息"],
    "en": ["try local food", "walk in the old town", "visit a market", "rest early"],
}
NOTES = {
    "zh": {"生日祝福": "祝你生日快乐，身体健康，天天开心！", "新年祝福": "祝你新年快乐，万事如意，阖家幸福！", "感谢信": "亲爱的{v}：谢谢您一直以来的帮助和关心，我会永远记在心里。",
           "道歉信": "亲爱的{v}：对不起，我做错了事，让您难过了。我以后一定改正，请您原谅。", "请假条": "尊敬的{v}：我因身体不适，需要请假{n}天，请您批准。谢谢！",
           "邀请函": "亲爱的{v}：这个周六下午三点我家有聚会，欢迎您来参加！", "祝贺语": "亲爱的{v}：祝贺您取得好成绩，希望您再接再厉！", "告别信": "亲爱的{v}：我要离开了，谢谢您的陪伴，希望我们常联系。"},
    "en": {"birthday wish": "Happy birthday! I wish you health, joy and a wonderful year.",
           "New Year wish": "Happy New Year! May it bring you health, luck and many good days.",
           "thank-you letter": "Dear {v}, thank you for all your help and kindness. I will not forget it.",
           "letter of apology": "Dear {v}, I am sorry for my mistake. I will do better. Please forgive me.",
           "request for leave": "Dear {v}, I am not well and would like to take {n} days off. Thank you.",
           "invitation": "Dear {v}, I am giving a party on Saturday at three. I would be glad to see you there.",
           "note of congratulation": "Dear {v}, congratulations on your success! I am very happy for you.",
           "farewell note": "Dear {v}, I am leaving soon. Thank you for the good time. Let us keep in touch."},
}  # fmt: skip
TO = {
    "zh": ["老师", "经理", "妈妈", "李阿姨", "王叔叔", "朋友", "张老师", "邻居", "同事"],
    "en": ["Mr Brown", "Anna", "Mother", "Ms Lee", "Tom", "Grandma", "Dr Smith", "Max", "Lucy"],
}
NOTE = {
    "zh": ["写一份给{v}的{t}。", "帮我给{v}写{t}", "请写一段{t}，给{v}。", "给{v}的{t}怎么写？", "替我写{t}，写给{v}。"],
    "en": ["Write a {t} to {v}.", "Please write a {t} for {v}.", "I need a {t} to {v}.", "Help me write a {t} to {v}.",
           "Draft a {t} for {v}."],
}  # fmt: skip


def _an(text: str) -> str:
    import re

    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _story(writer: Writer, language: str, a: str, b: str, c: str) -> str:
    values = {
        "a": a,
        "b": b,
        "c": c,
        "m": "位" if a in PERSONS else "只" if a != "机器人" else "个",
        "n": MEASURE.get(c, "个"),
    }
    parts = [writer.say(part[language], **values) for part in (BEGIN, MIDDLE, TURN, FINISH)]
    return _an(("" if language == "zh" else " ").join(parts))


def story(writer: Writer, language: str) -> Dialogue:
    a, b, c = writer.filler(
        lambda: (writer.one(HEROES[language]), writer.one(PLACES[language]), writer.one(OBJECTS[language]))
    )
    words = writer.some([a, b, c], 3)
    question = _an(writer.ask(STORY[language], a=words[0], b=words[1], c=words[2]))
    return Dialogue((question, _story(writer, language, a, b, c)), {"all": [[a], [b], [c]], "longer": 30})


def about(writer: Writer, language: str) -> Dialogue:
    a = writer.one(HEROES[language])
    text = _story(writer, language, a, writer.one(PLACES[language]), writer.one(OBJECTS[language]))
    return Dialogue((_an(writer.ask(ABOUT[language], a=a)), text), {"all": [[a]], "longer": 30})


def poem(writer: Writer, language: str) -> Dialogue:
    theme, lines = writer.one(list(POEMS[language].items()))
    return Dialogue(
        (writer.ask(POEM[language], t=theme), "\n".join(lines)), {"lines": 3} | chat(language, 10)
    )


def joke(writer: Writer, language: str) -> Dialogue:
    return Dialogue((writer.ask(JOKE[language]), writer.one(JOKES[language])), chat(language, 10))


def enumeration(writer: Writer, language: str) -> Dialogue:
    theme, words = writer.one(list(LISTS[language].items()))
    count = writer.number(2, 5)
    chosen = writer.some(words.split(), count)
    shown = COUNTS[language][count] if writer.chance(0.6) else count
    question = writer.ask(LIST[language], n=shown, t=theme)
    reply = "\n".join(f"{number}. {word}" for number, word in enumerate(chosen, 1))
    return Dialogue((question, reply), {"items": count})


def plan(writer: Writer, language: str) -> Dialogue:
    city, days = writer.filler(lambda: (writer.one(list(SIGHTS[language])), writer.number(1, 3)))
    sights = writer.some(SIGHTS[language][city].split(" " if language == "zh" else "|"), 2 * days)
    number = COUNTS[language].get(days, "一" if language == "zh" else "one")
    question = writer.ask(PLAN[language], c=city, n=number).replace("one days", "one day")
    lines = []
    for day in range(days):
        first, second = sights[2 * day : 2 * day + 2]
        evening = MEALS[language][writer.number(0, 3)]
        if language == "zh":
            lines.append(f"第{'一二三'[day]}天：上午去{first}，下午去{second}，晚上{evening}。")
        else:
            lines.append(f"Day {day + 1}: {first} in the morning, {second} in the afternoon; then {evening}.")
    return Dialogue(
        (question, "\n".join(lines)), {"lines": days, "all": [["天"] if language == "zh" else ["Day", "day"]]}
    )


def note(writer: Writer, language: str) -> Dialogue:
    kind, who = writer.filler(lambda: (writer.one(list(NOTES[language])), writer.one(TO[language])))
    text = NOTES[language][kind]
    question = _an(writer.ask(NOTE[language], t=kind, v=who))
    check: dict[str, object] = chat(language, 10)
    del check["refuses"]  # an apology says sorry, too
    if "{v}" in text:
        check["all"] = [[who]]
    return Dialogue((question, text.format(v=who, n=writer.number(2, 5))), check)


SKILL = Skill(
    "writing", [(3, story), (1.5, about), (1, poem), (0.7, joke), (1.3, enumeration), (1.2, plan), (1, note)]
)
