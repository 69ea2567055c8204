"""What the terminal chat says, in English and Chinese; the locale decides."""

from __future__ import annotations

import os

# (command, arguments, English, Chinese), in the order of /help.
_COMMANDS = [
    ("/file", "FILE", "send the text of a file with the next message", "把文件内容附在下一条消息前发送"),
    ("/retry", "", "answer the last message again", "重新回答上一条消息"),
    ("/undo", "", "take back the last message and its reply", "撤回上一条消息及其回复"),
    ("/reset", "", "clear the conversation, keep the system prompt", "清空对话，保留系统提示"),
    ("/system", "[TEXT]", "set the system prompt, or remove it", "设置系统提示；不带内容则删除"),
    ("/save", "FILE", "write the conversation to a file", "把对话保存到文件"),
    ("/load", "FILE", "continue a saved conversation", "继续已保存的对话"),
    ("/params", "[NAME=VALUE …]", "show or change the sampling parameters", "查看或修改采样参数"),
    ("/adapter", "[NAME|none]", "list the adapters, or use one from now on", "列出适配器，或切换到其中一个"),
    ("/help", "", "show this list", "显示本列表"),
    ("/exit", "", "leave (also Ctrl-D)", "退出（也可按 Ctrl-D）"),
]
COMMANDS = tuple(name for name, *_ in _COMMANDS)

_TEXTS = {
    "keys": (
        "Ctrl-C stops a reply, Alt-Enter starts a new line, // at the start of a line sends a slash.",
        "Ctrl-C 停止回复，Alt-Enter 换行，以 // 开头的行会发送一个斜杠。",
    ),
    "model": (
        "{name}: {parameters} parameters, a context of {context} tokens",
        "{name}：{parameters} 参数，上下文 {context} 个词元",
    ),
    "welcome": (
        "Type a message. /help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves.",
        "请输入消息。/help 列出命令；Ctrl-C 停止回复，Ctrl-D 退出。",
    ),
    "leave": ("Ctrl-D or /exit leaves.", "按 Ctrl-D 或输入 /exit 退出。"),
    "stopped": ("stopped; the reply so far is kept", "已停止，已生成的部分保留"),
    "cleared": ("conversation cleared", "对话已清空"),
    "system set": ("system prompt set", "系统提示已设置"),
    "system removed": ("system prompt removed", "系统提示已删除"),
    "saved": ("{count} messages saved to {file}", "{count} 条消息已保存到 {file}"),
    "loaded": ("{count} messages loaded from {file}", "已从 {file} 载入 {count} 条消息"),
    "undone": ("taken back: {text}", "已撤回：{text}"),
    "adapters": ("adapters: {names}; in use: {used}", "适配器：{names}；正在使用：{used}"),
    "attached": (
        "{file}: {count} tokens, sent with the next message",
        "{file}：{count} 个词元，随下一条消息发送",
    ),
    "same": (
        "with a seed or at temperature 0 the reply stays the same; /params changes them",
        "固定种子或温度为 0 时回复不变，可用 /params 修改",
    ),
    "speed": (
        "{count} tokens, the first after {first:.2f} s, then {rate:.1f} tok/s",
        "{count} 个词元，首词元 {first:.2f} 秒，之后每秒 {rate:.1f} 个词元",
    ),
    "no history": ("no history across sessions: {reason}", "无法跨会话保存输入历史：{reason}"),
}


def language() -> str:
    """``zh`` or ``en``, by the locale's variables."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(name):
            return "zh" if value.startswith("zh") else "en"
    return "en"


def translated(key: str, **values: object) -> str:
    return _TEXTS[key][language() == "zh"].format(**values)


def help_text() -> str:
    chinese = language() == "zh"
    lines = [f"{name + ' ' + arguments:23}{zh if chinese else en}" for name, arguments, en, zh in _COMMANDS]
    return "\n".join([*lines, translated("keys")])
