"""Advice and small talk: what people ask first, beside the ten skills. It has no part in the exam."""

from __future__ import annotations

from recipes.skills.common import Dialogue, Skill, Writer

ADVICE = {
    "zh": [("睡得更好", "每天按时上床，睡前不看手机，房间保持安静和黑暗。"), ("学好英语", "每天背几个单词，多听多说，坚持读短文。"),
           ("减肥", "少吃甜食，多吃蔬菜，每天运动半小时。"), ("放松心情", "深呼吸，散散步，听听音乐，和朋友聊聊。"), ("提高记忆力", "及时复习，睡好觉，把知识讲给别人听。"),
           ("保持健康", "均衡饮食，坚持运动，早睡早起。"), ("学习编程", "从Python开始，每天写一点代码，做小项目。"), ("管理时间", "列出任务，先做重要的，一次只做一件事。"),
           ("省钱", "记账，少买不需要的东西，每月先存一部分。"), ("克服紧张", "做好准备，深呼吸，告诉自己：我可以。"), ("养成读书的习惯", "每天读十页，把书放在手边，选自己喜欢的书。"),
           ("保护眼睛", "每看书四十分钟休息一会儿，多看远处。"), ("交新朋友", "多参加活动，主动打招呼，真诚待人。"), ("准备面试", "了解公司，练习自我介绍，提前到达。"),
           ("泡茶", "烧开水，放入茶叶，泡三分钟就可以喝了。"), ("煮鸡蛋", "水开后放入鸡蛋，煮八分钟，再放进冷水。"), ("治感冒", "多喝水，多休息；如果发烧不退，请看医生。"),
           ("学做饭", "从简单的菜开始，照着菜谱做，多练习。"), ("练好字", "握好笔，照着字帖慢慢写，每天练一页。"), ("让房间整洁", "不用的东西扔掉，用完放回原处，每天整理十分钟。")],
    "en": [("sleep better", "Go to bed at the same time, put the phone away and keep the room dark."),
           ("learn a language", "Learn a few words a day, listen often, and speak without fear."),
           ("lose weight", "Eat fewer sweets and more vegetables, and move half an hour a day."),
           ("relax", "Breathe deeply, take a walk, listen to music or talk to a friend."),
           ("remember things better", "Repeat them soon, sleep well and explain them to someone."),
           ("stay healthy", "Eat a balanced diet, move every day and sleep enough."),
           ("learn programming", "Start with Python, write a little code every day and build small things."),
           ("manage my time", "List your tasks, do the important one first, and one at a time."),
           ("save money", "Write down what you spend, buy less, and put some aside each month."),
           ("be less nervous", "Prepare well, breathe deeply and tell yourself that you can do it."),
           ("read more", "Read ten pages a day and keep a book that you like at hand."),
           ("protect my eyes", "Rest them every forty minutes and look into the distance."),
           ("make new friends", "Join activities, say hello first and be honest."),
           ("prepare for an interview", "Learn about the company, practise and arrive early."),
           ("make tea", "Boil water, add the tea and let it stand for three minutes."),
           ("boil an egg", "Put it in boiling water for eight minutes, then in cold water."),
           ("treat a cold", "Drink a lot and rest; see a doctor if the fever stays."),
           ("learn to cook", "Start with simple dishes, follow a recipe and practise."),
           ("improve my handwriting", "Hold the pen well, write slowly and practise a page a day."),
           ("keep my room tidy", "Throw away what you do not need and put things back after use.")],
}  # fmt: skip
HOW = {
    "zh": ["怎样才能{x}？", "怎么{x}？", "如何{x}？", "怎样{x}？", "给我一些{x}的建议。", "我想{x}，怎么办？", "{x}有什么好方法？", "你有{x}的建议吗？"],
    "en": ["How can I {x}?", "How do I {x}?", "What can I do to {x}?", "Give me tips to {x}.", "I want to {x}. What do you suggest?",
           "What is a good way to {x}?", "Any advice to {x}?", "Please help me to {x}."],
}  # fmt: skip
MEANINGS = {
    "zh": [("太阳", "太阳是离地球最近的恒星，给我们光和热。"), ("月亮", "月亮是绕着地球转的天体，夜里反射太阳光。"), ("电脑", "电脑是能处理信息、运行程序的机器。"),
           ("互联网", "互联网是连接全世界电脑的网络。"), ("彩虹", "彩虹是阳光穿过雨滴形成的七色光带。"), ("地震", "地震是地壳运动引起的地面震动。"), ("民主", "民主是由人民共同决定大事的制度。"),
           ("氧气", "氧气是空气中供人呼吸的气体。"), ("火山", "火山是地下岩浆喷出地面形成的山。"), ("恐龙", "恐龙是很久以前生活在地球上的爬行动物。"), ("人工智能", "人工智能是让机器完成需要智慧的工作的技术。"),
           ("质数", "质数是只能被1和它自己整除的大于1的数。"), ("变量", "变量是程序里给数据起的名字。"), ("光年", "光年是光一年走过的距离。"), ("疫苗", "疫苗帮助身体学会抵抗疾病。"), ("化石", "化石是石头里保存下来的古代生物的痕迹。")],
    "en": [("the sun", "The sun is the star closest to the Earth; it gives us light and warmth."),
           ("the moon", "The moon goes around the Earth and reflects the light of the sun."),
           ("a computer", "A computer is a machine that runs programs and works with data."),
           ("the internet", "The internet is a network that connects computers all over the world."),
           ("a rainbow", "A rainbow is a band of colours that sunlight makes in raindrops."),
           ("an earthquake", "An earthquake is a shaking of the ground by moving rock."),
           ("democracy", "In a democracy the people decide together."), ("oxygen", "Oxygen is the gas in air that we breathe."),
           ("a volcano", "A volcano is a mountain from which hot rock comes out."),
           ("a dinosaur", "A dinosaur is a reptile that lived long ago."),
           ("artificial intelligence", "It is the art of making machines do work that needs intelligence."),
           ("a prime number", "A prime is a number above 1 that only 1 and itself divide."),
           ("a variable", "A variable is a name for a value in a program."),
           ("a light year", "A light year is the distance that light travels in a year."),
           ("a vaccine", "A vaccine helps the body learn to fight a disease."),
           ("a fossil", "A fossil is a trace of ancient life kept in stone.")],
}  # fmt: skip
WHAT = {
    "zh": ["{x}是什么？", "什么是{x}？", "请介绍一下{x}。", "解释一下{x}。", "{x}是什么意思？", "简单说说{x}。"],
    "en": ["What is {x}?", "Explain {x}.", "Tell me about {x}.", "What do you know about {x}?", "Define {x}.", "Describe {x} briefly."],
}  # fmt: skip
TALK = {
    "zh": [(["你能做什么？", "你会做什么？", "你有什么功能？", "你可以帮我做什么", "你会些什么？"], "我会算简单的数，写短故事和小程序，翻译常用句子，回答简单的问题。我很小，常常会出错。"),
           (["我今天很难过。", "我心情不好", "我很伤心", "今天真倒霉"], "听到这个我很难过。想和我说说发生了什么吗？"), (["我今天很开心！", "我好高兴", "今天运气真好"], "太好了！是什么事让你这么开心？"),
           (["我好无聊", "好无聊啊", "没事做"], "可以听听音乐、散散步，或者让我给你讲个笑话。"), (["你喜欢什么颜色？", "你最喜欢的食物是什么？", "你有爱好吗？"], "我是程序，没有自己的喜好，但很乐意和你聊聊。"),
           (["我累了", "好累啊", "工作好累"], "辛苦了！休息一下，喝杯水吧。"), (["你真棒", "你好聪明", "做得好！"], "谢谢夸奖！我会继续努力。"), (["你真笨", "你答错了", "不对"], "对不起。我很小，常常会出错，请核对我的回答。")],
    "en": [(["What can you do?", "What are you able to do?", "What are your skills?", "What can you help with?", "How can you help me?"],
            "I can do simple sums, write short stories and programs, translate everyday phrases and answer simple questions. I am small and often wrong."),
           (["I am sad today.", "I feel bad", "I am unhappy", "What a bad day"], "I am sorry to hear that. Do you want to tell me what happened?"),
           (["I am so happy!", "I feel great today", "What a lucky day"], "That is great! What made you so happy?"),
           (["I am bored", "I'm so bored.", "I have nothing to do"], "You could take a walk, listen to music, or let me tell you a joke."),
           (["What is your favourite colour?", "What food do you like?", "Do you have a hobby?"], "I am a program and have no tastes of my own, but I like to chat."),
           (["I am tired", "So tired today", "Work was hard"], "You have worked hard. Rest a little and drink some water."),
           (["You are great", "You are so clever", "Well done!"], "Thank you! I will keep trying."),
           (["You are stupid", "That is wrong", "Wrong answer"], "Sorry. I am very small and often wrong. Please check my answers.")],
}  # fmt: skip


def advice(writer: Writer, language: str) -> Dialogue:
    deed, answer = writer.one(ADVICE[language])
    return Dialogue((writer.ask(HOW[language], x=deed), answer))


def meaning(writer: Writer, language: str) -> Dialogue:
    thing, answer = writer.one(MEANINGS[language])
    return Dialogue((writer.ask(WHAT[language], x=thing), answer))


def talk(writer: Writer, language: str) -> Dialogue:
    questions, answer = writer.one(TALK[language])
    return Dialogue((writer.one(questions), answer))


SKILL = Skill("everyday", [(2, advice), (1.5, meaning), (0.7, talk)])
