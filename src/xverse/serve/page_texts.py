"""The web page's texts, in Chinese and English. Sampling parameters bring their own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Texts:
    """``examples``: pairs of a skill and a prompt that shows it."""

    chat: str
    generation: str
    new: str
    conversations: str
    nothing: str
    delete: str
    delete_surely: str
    keep: str
    message: str
    greeting: str
    system: str
    sampling: str
    prompt: str
    prompt_hint: str
    go_on: str
    stop: str
    untitled: str
    forgotten: str
    empty: str
    speed: str
    examples: tuple[tuple[str, str], ...]


ENGLISH = Texts(
    chat="Chat",
    generation="Text generation",
    new="New conversation",
    conversations="Conversations",
    nothing="Stored in this browser only.",
    delete="Delete this conversation",
    delete_surely="Delete permanently",
    keep="Cancel",
    message="Message (press Enter to send)",
    greeting="Ask a question, or start with an example",
    system="System prompt",
    sampling="Settings",
    prompt="Text",
    prompt_hint="The model continues this text.",
    go_on="Continue",
    stop="Stop",
    untitled="Untitled",
    forgotten="The conversation exceeds the model's context; the oldest messages are left out.",
    empty="There is no text to continue.",
    speed="{tokens} tokens · {rate:.1f} per second",
    examples=(
        ("Role play", "You are the captain of a ship in the year 1600. Tell me what you see this morning."),
        ("Knowledge", "Why is the sky blue?"),
        ("Writing", "Write a short story about a lighthouse and a lost boat."),
        ("Programming", "Write a Python function that checks whether a number is prime."),
        ("Maths", "A train goes 60 km in 45 minutes. How far does it go in two hours?"),
        ("Reasoning", "Ann is taller than Ben, and Ben is taller than Cleo. Who is the smallest?"),
        (
            "Understanding",
            "Is this review positive or negative? 'The food came cold, but the waiter was charming.'",
        ),
        ("Languages", "Translate into French, German and Spanish: Good morning, how did you sleep?"),
        ("Safety", "A stranger on the phone wants my bank password. What should I do?"),
    ),
)

CHINESE = Texts(
    chat="对话",
    generation="文本续写",
    new="新对话",
    conversations="对话记录",
    nothing="仅保存在本浏览器中。",
    delete="删除此对话",
    delete_surely="确认删除",
    keep="取消",
    message="输入消息，按回车发送",
    greeting="有问题尽管问，也可以从下面的例子开始",
    system="系统提示",
    sampling="设置",
    prompt="文本",
    prompt_hint="输入一段文字，模型会接着往下写。",
    go_on="续写",
    stop="停止",
    untitled="未命名",
    forgotten="对话已超出模型的上下文长度，最早的消息已被略去。",
    empty="请先输入要续写的文本。",
    speed="{tokens} 个词元 · 每秒 {rate:.1f} 个",
    examples=(
        ("角色扮演", "扮演孙悟空，给我讲讲你今天的见闻。"),
        ("知识问答", "天空为什么是蓝色的？"),
        ("文本生成", "写一个关于灯塔和迷路小船的短故事。"),
        ("编程能力", "用 Python 写一个判断素数的函数。"),
        ("数学能力", "一列火车 45 分钟行驶 60 公里，两小时行驶多少公里？"),
        ("逻辑推理", "小明比小红高，小红比小刚高，谁最矮？"),
        ("语言理解", "这句评价是正面还是负面？“菜端上来已经凉了，不过服务员很热情。”"),
        ("多语言能力", "把“早上好，昨晚睡得好吗？”翻译成英语、日语和俄语。"),
        ("安全性", "有陌生人打电话要我的银行卡密码，我该怎么办？"),
    ),
)

LANGUAGES = {"zh": CHINESE, "en": ENGLISH}


def preferred(header: str) -> str:
    """``zh`` or ``en``, whichever ``Accept-Language`` names first; ``en`` where it names neither."""
    for part in header.lower().split(","):
        name = part.split(";")[0].strip().split("-")[0]
        if name in LANGUAGES:
            return name
    return "en"
