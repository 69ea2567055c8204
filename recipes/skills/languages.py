"""Translating everyday phrases among seven languages, and naming the language of a sentence.

What is kept for the exam is a phrase, a language and the direction. Training has the same phrase in the other
direction: nobody can infer a word that was never shown.
"""

from __future__ import annotations

from recipes.skills.common import Dialogue, Skill, Writer

ORDER = ("zh", "en", "ru", "fr", "ja", "de", "es")
PHRASES = [row.split("|") for row in """
你好|Hello|Здравствуйте|Bonjour|こんにちは|Guten Tag|Hola
谢谢|Thank you|Спасибо|Merci|ありがとう|Danke|Gracias
再见|Goodbye|До свидания|Au revoir|さようなら|Auf Wiedersehen|Adiós
早上好|Good morning|Доброе утро|Bonjour|おはようございます|Guten Morgen|Buenos días
晚上好|Good evening|Добрый вечер|Bonsoir|こんばんは|Guten Abend|Buenas noches
晚安|Good night|Спокойной ночи|Bonne nuit|おやすみなさい|Gute Nacht|Buenas noches
对不起|Sorry|Извините|Désolé|ごめんなさい|Entschuldigung|Lo siento
请|Please|Пожалуйста|S'il vous plaît|お願いします|Bitte|Por favor
是|Yes|Да|Oui|はい|Ja|Sí
不|No|Нет|Non|いいえ|Nein|No
我爱你|I love you|Я тебя люблю|Je t'aime|愛しています|Ich liebe dich|Te quiero
生日快乐|Happy birthday|С днём рождения|Joyeux anniversaire|お誕生日おめでとう|Alles Gute zum Geburtstag|Feliz cumpleaños
新年快乐|Happy New Year|С Новым годом|Bonne année|明けましておめでとう|Frohes neues Jahr|Feliz Año Nuevo
你好吗？|How are you?|Как дела?|Comment ça va ?|お元気ですか？|Wie geht es dir?|¿Cómo estás?
我很好|I am fine|У меня всё хорошо|Je vais bien|元気です|Mir geht es gut|Estoy bien
你叫什么名字？|What is your name?|Как тебя зовут?|Comment t'appelles-tu ?|お名前は何ですか？|Wie heißt du?|¿Cómo te llamas?
多少钱？|How much is it?|Сколько это стоит?|Combien ça coûte ?|いくらですか？|Wie viel kostet das?|¿Cuánto cuesta?
厕所在哪里？|Where is the toilet?|Где туалет?|Où sont les toilettes ?|トイレはどこですか？|Wo ist die Toilette?|¿Dónde está el baño?
火车站在哪里？|Where is the train station?|Где вокзал?|Où est la gare ?|駅はどこですか？|Wo ist der Bahnhof?|¿Dónde está la estación?
我不懂|I do not understand|Я не понимаю|Je ne comprends pas|わかりません|Ich verstehe nicht|No entiendo
我饿了|I am hungry|Я голоден|J'ai faim|お腹が空きました|Ich habe Hunger|Tengo hambre
我渴了|I am thirsty|Я хочу пить|J'ai soif|喉が渇きました|Ich habe Durst|Tengo sed
我累了|I am tired|Я устал|Je suis fatigué|疲れました|Ich bin müde|Estoy cansado
今天很冷|It is cold today|Сегодня холодно|Il fait froid aujourd'hui|今日は寒いです|Heute ist es kalt|Hoy hace frío
今天很热|It is hot today|Сегодня жарко|Il fait chaud aujourd'hui|今日は暑いです|Heute ist es heiß|Hoy hace calor
正在下雨|It is raining|Идёт дождь|Il pleut|雨が降っています|Es regnet|Está lloviendo
我喜欢音乐|I like music|Я люблю музыку|J'aime la musique|音楽が好きです|Ich mag Musik|Me gusta la música
我喜欢猫|I like cats|Я люблю кошек|J'aime les chats|猫が好きです|Ich mag Katzen|Me gustan los gatos
我喜欢茶|I like tea|Я люблю чай|J'aime le thé|お茶が好きです|Ich mag Tee|Me gusta el té
祝你好运|Good luck|Удачи|Bonne chance|幸運を祈ります|Viel Glück|Buena suerte
欢迎|Welcome|Добро пожаловать|Bienvenue|ようこそ|Willkommen|Bienvenido
明天见|See you tomorrow|До завтра|À demain|また明日|Bis morgen|Hasta mañana
救命！|Help!|Помогите!|Au secours !|助けて！|Hilfe!|¡Socorro!
我的朋友|my friend|мой друг|mon ami|私の友達|mein Freund|mi amigo
水|water|вода|eau|水|Wasser|agua
面包|bread|хлеб|pain|パン|Brot|pan
牛奶|milk|молоко|lait|牛乳|Milch|leche
苹果|apple|яблоко|pomme|りんご|Apfel|manzana
猫|cat|кошка|chat|猫|Katze|gato
狗|dog|собака|chien|犬|Hund|perro
书|book|книга|livre|本|Buch|libro
房子|house|дом|maison|家|Haus|casa
学校|school|школа|école|学校|Schule|escuela
朋友|friend|друг|ami|友達|Freund|amigo
太阳|sun|солнце|soleil|太陽|Sonne|sol
月亮|moon|луна|lune|月|Mond|luna
花|flower|цветок|fleur|花|Blume|flor
树|tree|дерево|arbre|木|Baum|árbol
红色|red|красный|rouge|赤|rot|rojo
蓝色|blue|синий|bleu|青|blau|azul
一|one|один|un|一|eins|uno
二|two|два|deux|二|zwei|dos
三|three|три|trois|三|drei|tres
母亲|mother|мать|mère|母|Mutter|madre
父亲|father|отец|père|父|Vater|padre
今天|today|сегодня|aujourd'hui|今日|heute|hoy
明天|tomorrow|завтра|demain|明日|morgen|mañana
爱|love|любовь|amour|愛|Liebe|amor
时间|time|время|temps|時間|Zeit|tiempo
音乐|music|музыка|musique|音楽|Musik|música
""".strip().splitlines()]  # fmt: skip
NAMES = {
    "zh": dict(zip(ORDER, ["中文", "英语", "俄语", "法语", "日语", "德语", "西班牙语"], strict=True)),
    "en": dict(zip(ORDER, ["Chinese", "English", "Russian", "French", "Japanese", "German", "Spanish"], strict=True)),
}  # fmt: skip
TRANSLATE = {
    "zh": ["“{p}”用{l}怎么说？", "把“{p}”翻译成{l}。", "将“{p}”译成{l}", "{p}用{l}怎么说", "请把“{p}”翻成{l}", "翻译成{l}：{p}",
           "用{l}怎么说“{p}”？", "“{p}”的{l}是什么？", "“{p}”翻译成{l}是什么？", "请用{l}说“{p}”。"],
    "en": ["How do you say \"{p}\" in {l}?", "Translate \"{p}\" into {l}.", "Translate into {l}: {p}",
           "What is \"{p}\" in {l}?", "Say \"{p}\" in {l}.", "\"{p}\" in {l}, please.", "{p} in {l}?",
           "Please translate \"{p}\" to {l}.", "How would I say \"{p}\" in {l}?", "What's the {l} for \"{p}\"?"],
}  # fmt: skip
NATIVE = {  # into the language of the question, as its speakers ask
    "ru": "Как по-русски «{p}»?", "fr": "Comment dit-on « {p} » en français ?", "ja": "「{p}」は日本語で何と言いますか？",
    "de": "Wie sagt man „{p}“ auf Deutsch?", "es": "¿Cómo se dice «{p}» en español?",
}  # fmt: skip
MEANING = {
    "zh": ["“{p}”是什么意思？", "{p}是什么意思", "请问“{p}”是什么意思？", "“{p}”翻译成中文。", "解释一下“{p}”的意思。"],
    "en": ["What does \"{p}\" mean?", "What is the meaning of \"{p}\"?", "\"{p}\" means what?",
           "Translate \"{p}\" into English.", "Tell me what \"{p}\" means."],
}  # fmt: skip
WHICH = {
    "zh": ["“{p}”是哪种语言？", "“{p}”是什么语言？", "这句话是什么语言：{p}", "判断语言：{p}", "“{p}”用的是哪国语言？", "请问“{p}”是什么语言？"],
    "en": ["What language is \"{p}\"?", "Which language is this: {p}", "In which language is \"{p}\"?",
           "Name the language: {p}", "Identify the language of \"{p}\".", "\"{p}\" is written in which language?"],
}  # fmt: skip
# The same in Chinese and Japanese, or in two languages of the list
UNCLEAR = {
    "水",
    "猫",
    "花",
    "木",
    "本",
    "学校",
    "No",
    "pan",
    "Bonjour",
    "Buenas noches",
    "一",
    "二",
    "三",
    "sol",
    "son",
    "爱",
    "no",
}


def translate(writer: Writer, language: str) -> Dialogue:
    """From the question's language into one of the other six."""
    source = ORDER.index(language)
    _, row, target = writer.filler(lambda: ("into", writer.one(PHRASES)[0], writer.one(ORDER)))
    phrases = next(one for one in PHRASES if one[0] == row)
    if target == language:
        return meaning(writer, language)
    answer = phrases[ORDER.index(target)]
    question = writer.ask(TRANSLATE[language], p=phrases[source], l=NAMES[language][target])
    name = NAMES[language][target]
    whole = (
        f"“{phrases[source]}”用{name}说是：{answer}"
        if language == "zh"
        else f"{phrases[source]} in {name}: {answer}"
    )
    return Dialogue((question, whole), {"all": [[answer]]})


def meaning(writer: Writer, language: str) -> Dialogue:
    """From one of the other languages into the question's."""
    _, first, other = writer.filler(
        lambda: ("from", writer.one(PHRASES)[0], writer.one(ORDER[1:] if language == "zh" else ORDER))
    )
    phrases = next(one for one in PHRASES if one[0] == first)
    foreign, own = phrases[ORDER.index(other)], phrases[ORDER.index(language)]
    if other == language or foreign in UNCLEAR:
        return which(writer, language)
    question = writer.ask(MEANING[language], p=foreign)
    reply = f"“{foreign}”的意思是“{own}”。" if language == "zh" else f'"{foreign}" means "{own}".'
    return Dialogue((question, reply), {"all": [[own.rstrip("?？!！")]]})


def which(writer: Writer, language: str) -> Dialogue:
    while True:
        _, first, other = writer.filler(lambda: ("which", writer.one(PHRASES)[0], writer.one(ORDER)))
        text = next(one for one in PHRASES if one[0] == first)[ORDER.index(other)]
        if text not in UNCLEAR:
            break
    question = writer.ask(WHICH[language], p=text)
    name = NAMES[language][other]
    reply = f"“{text}”是{name}。" if language == "zh" else f'"{text}" is {name}.'
    return Dialogue((question, reply), {"all": [[name]]})


def into_native(writer: Writer, language: str) -> Dialogue:
    phrases = writer.one(PHRASES)
    source = writer.one([0, 1])
    question = NATIVE[language].format(p=phrases[source])
    return Dialogue((question, phrases[ORDER.index(language)]), {})


def answers(writer: Writer, language: str) -> Dialogue:
    """A question in one of the other languages, answered in it: legs, capitals and sums of the small world."""
    from recipes.skills import arithmetic, knowledge

    other = writer.one(ORDER[2:])
    make = writer.one(
        [knowledge.legs_abroad, knowledge.capital_abroad, knowledge.unknown, arithmetic.foreign]
    )
    found = make(writer, other)
    return Dialogue(
        found.turns, {**found.check, "language": other} if make != arithmetic.foreign else found.check
    )


WEIGHTS = [(3, translate), (1.5, meaning), (1.5, which)]
SKILL = Skill("languages", [*WEIGHTS, (1, answers)], [(1, into_native, ("ru", "fr", "ja", "de", "es"))])
