"""The result tables of XVERSE-7B's README, with their footnotes."""

from __future__ import annotations

# Model, kind (base, chat), then MMLU, C-Eval, AGIEval, GAOKAO-Bench, GAOKAO-English; "²": as the model's own
# authors report it.
OVERALL_COLUMNS = ("mmlu", "ceval", "agieval", "gaokao-bench", "gaokao-english")
OVERALL: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Baichuan-7B", "base", ("42.3²", "42.8²", "34.4²", "36.3²", "44.3")),
    ("Baichuan2-7B-Base", "base", ("54.2²", "54.0²", "42.7²", "47.5²", "53.1")),
    ("Baichuan2-7B-Chat", "chat", ("53.2", "52.2", "41.3", "49.7", "66.6")),
    ("ChatGLM2-6B", "chat", ("45.5²", "50.1²", "42.6", "54.2", "59.7")),
    ("Falcon-7B", "base", ("27.8²", "25.8", "26.2", "26.3", "29.9")),
    ("InternLM-7B", "base", ("51.0²", "52.4", "34.1", "53.6", "32.3")),
    ("InternLM-7B-Chat", "chat", ("50.8²", "52.8", "39.0", "67.4", "43.9")),
    ("Llama-7B", "base", ("35.1²", "27.0", "27.4", "26.0", "30.1")),
    ("Llama-2-7B", "base", ("45.3²", "28.9", "27.0", "27.8", "47.8")),
    ("MPT-7B", "base", ("29.6²", "27.8", "24.2", "25.3", "28.1")),
    ("Vicuna-7B-v1.5", "chat", ("49.8²", "22.9", "26.7", "24.4", "61.1")),
    ("XVERSE-7B", "base", ("56.6", "57.1", "46.9", "61.7", "71.1")),
    ("XVERSE-7B-Chat", "chat", ("63.7", "55.4", "48.9", "57.5", "78.2")),
)
FOOTNOTES = (
    "¹ Single-answer multiple-choice questions alone: no cloze, open or multiple-answer questions.",
    "² As the model's own authors report it.",
)

# Average, then STEM, social science, humanities, others.
CATEGORY_COLUMNS = ("Average", "STEM", "Social Science", "Humanities", "Others")
MMLU: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Baichuan-7B", "base", ("42.3", "35.6", "48.9", "38.4", "48.1")),
    ("Baichuan2-7B-Chat", "chat", ("53.2", "43.1", "59.1", "50.0", "59.1")),
    ("ChatGLM2-6B", "chat", ("45.5", "40.1", "51.6", "41.2", "51.2")),
    ("InternLM-7B", "base", ("51.0", "58.7", "43.5", "52.7", "53.2")),
    ("LLaMA-7B", "base", ("35.1", "30.5", "38.3", "34.0", "38.1")),
    ("LLaMA2-7B", "base", ("45.3", "36.4", "51.2", "42.9", "52.2")),
    ("XVERSE-7B", "base", ("56.6", "45.6", "65.3", "50.4", "65.5")),
    ("XVERSE-7B-Chat", "chat", ("63.7", "51.7", "72.5", "58.2", "72.2")),
)
CEVAL: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Baichuan-7B", "base", ("42.8", "38.2", "52.0", "46.2", "39.3")),
    ("Baichuan2-7B-Base", "base", ("54.9", "47.9", "67.3", "58.4", "52.8")),
    ("Baichuan2-7B-Chat", "chat", ("52.2", "44.6", "65.0", "55.8", "50.9")),
    ("ChatGLM2-6B", "chat", ("50.1", "46.4", "60.4", "50.6", "46.9")),
    ("Falcon-7B", "base", ("25.8", "25.8", "26.0", "25.8", "25.7")),
    ("InternLM-7B", "base", ("52.4", "47.0", "64.9", "55.6", "47.6")),
    ("InternLM-7B-Chat", "chat", ("52.8", "48.4", "65.6", "57.0", "45.0")),
    ("LLaMA-7B", "base", ("27.0", "26.7", "26.7", "28.4", "26.2")),
    ("LLaMA2-7B", "base", ("28.9", "26.8", "34.5", "30.0", "26.4")),
    ("MPT-7B", "base", ("27.8", "27.4", "29.8", "26.9", "27.7")),
    ("Vicuna-7B-v1.5", "chat", ("22.9", "21.8", "23.3", "24.0", "23.3")),
    ("XVERSE-7B", "base", ("57.1", "48.9", "71.0", "59.7", "56.7")),
    ("XVERSE-7B-Chat", "chat", ("55.4", "47.9", "68.5", "57.3", "55.1")),
)
# The names that the benchmarks use for these categories, in the tables' order.
CATEGORIES = {
    "mmlu": ("STEM", "social sciences", "humanities", "other"),
    "ceval": ("STEM", "Social Science", "Humanities", "Other"),
}
# Precision, GB of memory, MMLU; of XVERSE-7B-Chat.
QUANTISED = (("BF16 / FP16", "16.2", "63.7"), ("INT8", "9.1", "63.5"), ("INT4", "5.9", "56.1"))
