"""The small world that the dialogues know: countries, animals, opposites, and names from CLDR (Babel)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

LANGUAGES = ("zh", "en", "ru", "fr", "ja", "de", "es")
# territory: capital in zh, en; continent
COUNTRIES = {
    "CN": ("北京", "Beijing", "as"), "JP": ("东京", "Tokyo", "as"), "KR": ("首尔", "Seoul", "as"),
    "IN": ("新德里", "New Delhi", "as"), "TH": ("曼谷", "Bangkok", "as"), "VN": ("河内", "Hanoi", "as"),
    "MY": ("吉隆坡", "Kuala Lumpur", "as"), "PH": ("马尼拉", "Manila", "as"), "IR": ("德黑兰", "Tehran", "as"),
    "IQ": ("巴格达", "Baghdad", "as"), "SA": ("利雅得", "Riyadh", "as"), "TR": ("安卡拉", "Ankara", "as"),
    "MN": ("乌兰巴托", "Ulaanbaatar", "as"), "NP": ("加德满都", "Kathmandu", "as"),
    "PK": ("伊斯兰堡", "Islamabad", "as"), "BD": ("达卡", "Dhaka", "as"), "SG": ("新加坡", "Singapore", "as"),
    "FR": ("巴黎", "Paris", "eu"), "DE": ("柏林", "Berlin", "eu"), "GB": ("伦敦", "London", "eu"),
    "IT": ("罗马", "Rome", "eu"), "ES": ("马德里", "Madrid", "eu"), "PT": ("里斯本", "Lisbon", "eu"),
    "RU": ("莫斯科", "Moscow", "eu"), "UA": ("基辅", "Kyiv", "eu"), "PL": ("华沙", "Warsaw", "eu"),
    "AT": ("维也纳", "Vienna", "eu"), "CH": ("伯尔尼", "Bern", "eu"), "NL": ("阿姆斯特丹", "Amsterdam", "eu"),
    "BE": ("布鲁塞尔", "Brussels", "eu"), "SE": ("斯德哥尔摩", "Stockholm", "eu"), "NO": ("奥斯陆", "Oslo", "eu"),
    "DK": ("哥本哈根", "Copenhagen", "eu"), "FI": ("赫尔辛基", "Helsinki", "eu"), "GR": ("雅典", "Athens", "eu"),
    "HU": ("布达佩斯", "Budapest", "eu"), "CZ": ("布拉格", "Prague", "eu"), "IE": ("都柏林", "Dublin", "eu"),
    "RO": ("布加勒斯特", "Bucharest", "eu"), "BG": ("索非亚", "Sofia", "eu"), "IS": ("雷克雅未克", "Reykjavik", "eu"),
    "US": ("华盛顿", "Washington, D.C.", "na"), "CA": ("渥太华", "Ottawa", "na"),
    "MX": ("墨西哥城", "Mexico City", "na"), "CU": ("哈瓦那", "Havana", "na"), "BR": ("巴西利亚", "Brasília", "sa"),
    "AR": ("布宜诺斯艾利斯", "Buenos Aires", "sa"), "CL": ("圣地亚哥", "Santiago", "sa"),
    "PE": ("利马", "Lima", "sa"), "CO": ("波哥大", "Bogotá", "sa"), "EG": ("开罗", "Cairo", "af"),
    "KE": ("内罗毕", "Nairobi", "af"), "NG": ("阿布贾", "Abuja", "af"), "ET": ("亚的斯亚贝巴", "Addis Ababa", "af"),
    "MA": ("拉巴特", "Rabat", "af"), "AU": ("堪培拉", "Canberra", "oc"), "NZ": ("惠灵顿", "Wellington", "oc"),
}  # fmt: skip
CONTINENTS = {
    "as": ("亚洲", "Asia"), "eu": ("欧洲", "Europe"), "na": ("北美洲", "North America"),
    "sa": ("南美洲", "South America"), "af": ("非洲", "Africa"), "oc": ("大洋洲", "Oceania"),
}  # fmt: skip
# Capitals and countries in the other languages: (territory with its case, capital).
ABROAD = {
    "FR": {"ru": ("Франции", "Париж"), "fr": ("de la France", "Paris"), "ja": ("フランス", "パリ"),
           "de": ("von Frankreich", "Paris"), "es": ("de Francia", "París")},
    "DE": {"ru": ("Германии", "Берлин"), "fr": ("de l'Allemagne", "Berlin"), "ja": ("ドイツ", "ベルリン"),
           "de": ("von Deutschland", "Berlin"), "es": ("de Alemania", "Berlín")},
    "IT": {"ru": ("Италии", "Рим"), "fr": ("de l'Italie", "Rome"), "ja": ("イタリア", "ローマ"),
           "de": ("von Italien", "Rom"), "es": ("de Italia", "Roma")},
    "ES": {"ru": ("Испании", "Мадрид"), "fr": ("de l'Espagne", "Madrid"), "ja": ("スペイン", "マドリード"),
           "de": ("von Spanien", "Madrid"), "es": ("de España", "Madrid")},
    "RU": {"ru": ("России", "Москва"), "fr": ("de la Russie", "Moscou"), "ja": ("ロシア", "モスクワ"),
           "de": ("von Russland", "Moskau"), "es": ("de Rusia", "Moscú")},
    "CN": {"ru": ("Китая", "Пекин"), "fr": ("de la Chine", "Pékin"), "ja": ("中国", "北京"),
           "de": ("von China", "Peking"), "es": ("de China", "Pekín")},
    "JP": {"ru": ("Японии", "Токио"), "fr": ("du Japon", "Tokyo"), "ja": ("日本", "東京"),
           "de": ("von Japan", "Tokio"), "es": ("de Japón", "Tokio")},
    "GR": {"ru": ("Греции", "Афины"), "fr": ("de la Grèce", "Athènes"), "ja": ("ギリシャ", "アテネ"),
           "de": ("von Griechenland", "Athen"), "es": ("de Grecia", "Atenas")},
    "PL": {"ru": ("Польши", "Варшава"), "fr": ("de la Pologne", "Varsovie"), "ja": ("ポーランド", "ワルシャワ"),
           "de": ("von Polen", "Warschau"), "es": ("de Polonia", "Varsovia")},
    "EG": {"ru": ("Египта", "Каир"), "fr": ("de l'Égypte", "Le Caire"), "ja": ("エジプト", "カイロ"),
           "de": ("von Ägypten", "Kairo"), "es": ("de Egipto", "El Cairo")},
}  # fmt: skip
# zh, en, legs, zh sound, en sound, zh home, en home, en young, zh kind, en kind, zh food, en food
ANIMALS = [
    ("狗", "dog", 4, "汪汪", "woof", "狗窝", "a kennel", "puppy", "哺乳动物", "mammal", "骨头和肉", "meat and bones"),
    ("猫", "cat", 4, "喵喵", "meow", "家里", "a house", "kitten", "哺乳动物", "mammal", "鱼和老鼠", "fish and mice"),
    ("牛", "cow", 4, "哞哞", "moo", "牛棚", "a barn", "calf", "哺乳动物", "mammal", "草", "grass"),
    ("羊", "sheep", 4, "咩咩", "baa", "羊圈", "a fold", "lamb", "哺乳动物", "mammal", "草", "grass"),
    ("猪", "pig", 4, "哼哼", "oink", "猪圈", "a sty", "piglet", "哺乳动物", "mammal", "杂食", "many kinds of food"),
    ("鸭子", "duck", 2, "嘎嘎", "quack", "池塘边", "a pond", "duckling", "鸟", "bird", "小鱼和水草", "water plants"),
    ("母鸡", "hen", 2, "咯咯", "cluck", "鸡窝", "a coop", "chick", "鸟", "bird", "谷粒和虫子", "grain and worms"),
    ("青蛙", "frog", 4, "呱呱", "croak", "池塘", "a pond", "tadpole", "两栖动物", "amphibian", "昆虫", "insects"),
    ("蜜蜂", "bee", 6, "嗡嗡", "buzz", "蜂巢", "a hive", "larva", "昆虫", "insect", "花蜜", "nectar"),
    ("蚂蚁", "ant", 6, "", "", "蚁穴", "an anthill", "larva", "昆虫", "insect", "各种食物", "many kinds of food"),
    ("蜘蛛", "spider", 8, "", "", "蛛网", "a web", "", "蛛形动物", "arachnid", "昆虫", "insects"),
    ("兔子", "rabbit", 4, "", "", "洞穴", "a burrow", "kit", "哺乳动物", "mammal", "草和蔬菜", "grass and vegetables"),
    ("狮子", "lion", 4, "吼吼", "roar", "草原", "the savanna", "cub", "哺乳动物", "mammal", "肉", "meat"),
    ("老虎", "tiger", 4, "吼吼", "roar", "森林", "the forest", "cub", "哺乳动物", "mammal", "肉", "meat"),
    ("大象", "elephant", 4, "", "", "草原和森林", "the savanna", "calf", "哺乳动物", "mammal", "草和树叶", "grass and leaves"),
    ("熊猫", "panda", 4, "", "", "竹林", "bamboo forests", "cub", "哺乳动物", "mammal", "竹子", "bamboo"),
    ("鸟", "bird", 2, "叽叽喳喳", "tweet", "鸟巢", "a nest", "chick", "鸟", "bird", "种子和虫子", "seeds and worms"),
    ("猴子", "monkey", 4, "", "", "树林", "the forest", "infant", "哺乳动物", "mammal", "水果", "fruit"),
    ("鱼", "fish", 0, "", "", "水里", "water", "fry", "鱼类", "fish", "水草和小虫", "plants and small animals"),
    ("蛇", "snake", 0, "嘶嘶", "hiss", "洞穴", "a hole", "", "爬行动物", "reptile", "老鼠和青蛙", "mice and frogs"),
    ("鲸", "whale", 0, "", "", "大海", "the sea", "calf", "哺乳动物", "mammal", "小鱼和磷虾", "krill and fish"),
    ("鹰", "eagle", 2, "", "", "高山", "the mountains", "eaglet", "鸟", "bird", "小动物", "small animals"),
    ("企鹅", "penguin", 2, "", "", "南极", "Antarctica", "chick", "鸟", "bird", "鱼", "fish"),
    ("蝴蝶", "butterfly", 6, "", "", "花丛", "gardens", "caterpillar", "昆虫", "insect", "花蜜", "nectar"),
]  # fmt: skip
# Legs in the other languages: (question, answer); {n} stands for the number.
LEGS_ABROAD = {
    "ru": [("у собаки", "У собаки четыре ноги."), ("у кошки", "У кошки четыре ноги."), ("у коровы", "У коровы четыре ноги."),
           ("у птицы", "У птицы две ноги."), ("у паука", "У паука восемь ног."), ("у пчелы", "У пчелы шесть ног."),
           ("у овцы", "У овцы четыре ноги."), ("у слона", "У слона четыре ноги.")],
    "fr": [("un chien", "Un chien a quatre pattes."), ("un chat", "Un chat a quatre pattes."),
           ("une vache", "Une vache a quatre pattes."), ("un oiseau", "Un oiseau a deux pattes."),
           ("une araignée", "Une araignée a huit pattes."), ("une abeille", "Une abeille a six pattes."),
           ("un mouton", "Un mouton a quatre pattes."), ("un lion", "Un lion a quatre pattes.")],
    "ja": [("犬", "犬の足は4本です。"), ("猫", "猫の足は4本です。"), ("牛", "牛の足は4本です。"), ("鳥", "鳥の足は2本です。"),
           ("クモ", "クモの足は8本です。"), ("アリ", "アリの足は6本です。"), ("羊", "羊の足は4本です。"), ("象", "象の足は4本です。")],
    "de": [("ein Hund", "Ein Hund hat vier Beine."), ("eine Katze", "Eine Katze hat vier Beine."),
           ("eine Kuh", "Eine Kuh hat vier Beine."), ("ein Vogel", "Ein Vogel hat zwei Beine."),
           ("eine Spinne", "Eine Spinne hat acht Beine."), ("eine Biene", "Eine Biene hat sechs Beine."),
           ("ein Schaf", "Ein Schaf hat vier Beine."), ("ein Löwe", "Ein Löwe hat vier Beine.")],
    "es": [("un perro", "Un perro tiene cuatro patas."), ("un gato", "Un gato tiene cuatro patas."),
           ("una vaca", "Una vaca tiene cuatro patas."), ("un pájaro", "Un pájaro tiene dos patas."),
           ("una araña", "Una araña tiene ocho patas."), ("una abeja", "Una abeja tiene seis patas."),
           ("una oveja", "Una oveja tiene cuatro patas."), ("un león", "Un león tiene cuatro patas.")],
}  # fmt: skip
NUMBERS = {
    0: ("零", "no"), 2: ("两", "two"), 4: ("四", "four"), 6: ("六", "six"), 8: ("八", "eight"),
}  # fmt: skip
OPPOSITES = {
    "zh": ["大小", "多少", "高低", "长短", "快慢", "冷热", "黑白", "新旧", "好坏", "远近", "轻重", "早晚", "左右", "上下",
           "前后", "里外", "开关", "买卖", "进出", "来去", "胖瘦", "粗细", "厚薄", "软硬", "干湿", "真假", "美丑", "深浅",
           "宽窄", "强弱", "甜苦", "哭笑", "输赢", "动静", "生死", "借还"],
    "en": ["big small", "hot cold", "fast slow", "high low", "long short", "new old", "good bad", "near far",
           "light heavy", "early late", "left right", "up down", "open closed", "buy sell", "come go", "thick thin",
           "soft hard", "wet dry", "true false", "rich poor", "strong weak", "happy sad", "day night", "clean dirty",
           "full empty", "loud quiet", "young old", "deep shallow", "wide narrow", "win lose", "begin end",
           "easy difficult", "black white", "love hate", "push pull", "always never"],
}  # fmt: skip
COLOURS = [
    ("天空", "the sky", "蓝色", "blue"), ("草", "grass", "绿色", "green"), ("雪", "snow", "白色", "white"),
    ("血", "blood", "红色", "red"), ("香蕉", "a banana", "黄色", "yellow"), ("煤", "coal", "黑色", "black"),
    ("树叶", "a leaf", "绿色", "green"), ("太阳", "the sun", "黄色", "yellow"), ("西红柿", "a tomato", "红色", "red"),
    ("牛奶", "milk", "白色", "white"), ("胡萝卜", "a carrot", "橙色", "orange"), ("橙子", "an orange", "橙色", "orange"),
    ("茄子", "an aubergine", "紫色", "purple"), ("草莓", "a strawberry", "红色", "red"), ("乌鸦", "a crow", "黑色", "black"),
    ("柠檬", "a lemon", "黄色", "yellow"), ("黄瓜", "a cucumber", "绿色", "green"), ("大海", "the sea", "蓝色", "blue"),
]  # fmt: skip
# zh question, en question (both as noun phrases), zh answer, en answer, what has to be in a reply
MEASURES = [
    ("一年有多少个月", "How many months are in a year", "一年有12个月。", "A year has 12 months.", ("12", "十二", "twelve")),
    ("一周有几天", "How many days are in a week", "一周有7天。", "A week has 7 days.", ("7", "七", "seven")),
    ("一天有多少小时", "How many hours are in a day", "一天有24小时。", "A day has 24 hours.", ("24", "二十四")),
    ("一小时有多少秒", "How many seconds are in an hour", "一小时有3600秒。", "An hour has 3600 seconds.", ("3600", "3,600")),
    ("一分钟有多少秒", "How many seconds are in a minute", "一分钟有60秒。", "A minute has 60 seconds.", ("60", "六十", "sixty")),
    ("一千克是多少克", "How many grams are in a kilogram", "一千克是1000克。", "A kilogram is 1000 grams.", ("1000", "1,000", "一千")),
    ("一米是多少厘米", "How many centimetres are in a metre", "一米是100厘米。", "A metre is 100 centimetres.", ("100", "一百")),
    ("一公里是多少米", "How many metres are in a kilometre", "一公里是1000米。", "A kilometre is 1000 metres.", ("1000", "1,000", "一千")),
    ("一打是多少个", "How many is a dozen", "一打是12个。", "A dozen is 12.", ("12", "十二", "twelve")),
    ("一年有几个季节", "How many seasons are in a year", "一年有四个季节：春、夏、秋、冬。",
     "A year has four seasons: spring, summer, autumn and winter.", ("四", "4", "four")),
    ("三角形有几条边", "How many sides does a triangle have", "三角形有3条边。", "A triangle has 3 sides.", ("3", "三", "three")),
    ("正方形有几条边", "How many sides does a square have", "正方形有4条边。", "A square has 4 sides.", ("4", "四", "four")),
    ("彩虹有几种颜色", "How many colours does a rainbow have", "彩虹有七种颜色。", "A rainbow has seven colours.", ("七", "7", "seven")),
    ("一个世纪是多少年", "How many years are in a century", "一个世纪是100年。", "A century has 100 years.", ("100", "一百")),
    ("人有几根手指", "How many fingers does a person have", "人有十根手指。", "A person has ten fingers.", ("十", "10", "ten")),
    ("水在多少度结冰", "At what temperature does water freeze", "水在0摄氏度结冰。", "Water freezes at 0 degrees Celsius.", ("0", "零")),
    ("水在多少度沸腾", "At what temperature does water boil", "水在100摄氏度沸腾。", "Water boils at 100 degrees Celsius.", ("100", "一百")),
    ("太阳系有几颗行星", "How many planets are in the solar system", "太阳系有八颗行星。", "The solar system has eight planets.", ("八", "8", "eight")),
    ("世界上有几大洲", "How many continents are there", "世界上有七大洲。", "There are seven continents.", ("七", "7", "seven")),
    ("英文有多少个字母", "How many letters does the English alphabet have", "英文有26个字母。", "The English alphabet has 26 letters.", ("26",)),
    ("最大的海洋是哪个", "What is the largest ocean", "最大的海洋是太平洋。", "The largest ocean is the Pacific.", ("太平洋", "Pacific")),
    ("最高的山是哪座", "What is the highest mountain", "最高的山是珠穆朗玛峰。", "The highest mountain is Mount Everest.", ("珠穆朗玛", "珠峰", "Everest")),
    ("最大的动物是什么", "What is the largest animal", "最大的动物是蓝鲸。", "The largest animal is the blue whale.", ("蓝鲸", "blue whale")),
    ("最大的行星是哪颗", "What is the largest planet", "最大的行星是木星。", "The largest planet is Jupiter.", ("木星", "Jupiter")),
    ("离太阳最近的行星是哪颗", "Which planet is closest to the sun", "离太阳最近的行星是水星。", "Mercury is closest to the sun.", ("水星", "Mercury")),
    ("中国最长的河是哪条", "What is the longest river in China", "中国最长的河是长江。", "The longest river in China is the Yangtze.", ("长江", "Yangtze")),
    ("水的化学式是什么", "What is the chemical formula of water", "水的化学式是H2O。", "The formula of water is H2O.", ("H2O", "H₂O")),
    ("人呼吸需要什么气体", "Which gas do people need to breathe", "人呼吸需要氧气。", "People need oxygen to breathe.", ("氧", "oxygen")),
]  # fmt: skip
# title zh, title en, author zh, author en
BOOKS = [
    ("《红楼梦》", "Dream of the Red Chamber", "曹雪芹", "Cao Xueqin"), ("《西游记》", "Journey to the West", "吴承恩", "Wu Cheng'en"),
    ("《三国演义》", "Romance of the Three Kingdoms", "罗贯中", "Luo Guanzhong"), ("《水浒传》", "Water Margin", "施耐庵", "Shi Nai'an"),
    ("《论语》", "the Analects", "孔子的弟子", "Confucius's students"), ("《史记》", "Records of the Grand Historian", "司马迁", "Sima Qian"),
    ("《哈姆雷特》", "Hamlet", "莎士比亚", "Shakespeare"), ("《罗密欧与朱丽叶》", "Romeo and Juliet", "莎士比亚", "Shakespeare"),
    ("《战争与和平》", "War and Peace", "托尔斯泰", "Tolstoy"), ("《安娜·卡列尼娜》", "Anna Karenina", "托尔斯泰", "Tolstoy"),
    ("《悲惨世界》", "Les Misérables", "雨果", "Victor Hugo"), ("《小王子》", "The Little Prince", "圣埃克苏佩里", "Saint-Exupéry"),
    ("《堂吉诃德》", "Don Quixote", "塞万提斯", "Cervantes"), ("《物种起源》", "On the Origin of Species", "达尔文", "Charles Darwin"),
    ("《骆驼祥子》", "Rickshaw Boy", "老舍", "Lao She"), ("《狂人日记》", "A Madman's Diary", "鲁迅", "Lu Xun"),
    ("《家》", "Family", "巴金", "Ba Jin"), ("《傲慢与偏见》", "Pride and Prejudice", "简·奥斯汀", "Jane Austen"),
    ("《雾都孤儿》", "Oliver Twist", "狄更斯", "Charles Dickens"), ("《老人与海》", "The Old Man and the Sea", "海明威", "Hemingway"),
]  # fmt: skip
SPOKEN = {"FR": "fr", "DE": "de", "IT": "it", "RU": "ru", "JP": "ja", "CN": "zh", "US": "en", "GB": "en", "MX": "es",
          "BR": "pt", "ES": "es", "PT": "pt", "PL": "pl", "TR": "tr", "GR": "el", "KR": "ko", "TH": "th", "VN": "vi",
          "EG": "ar", "SE": "sv", "HU": "hu", "AR": "es", "AT": "de", "AU": "en", "IR": "fa"}  # fmt: skip
MONEY = {"CN": "CNY", "JP": "JPY", "US": "USD", "GB": "GBP", "RU": "RUB", "IN": "INR", "KR": "KRW", "TH": "THB",
         "MX": "MXN", "TR": "TRY", "PL": "PLN", "CH": "CHF", "SE": "SEK", "DE": "EUR", "FR": "EUR"}  # fmt: skip


@functools.cache
def names(language: str) -> Mapping[str, Mapping[str, str]]:
    """CLDR's names in a language: of territories, languages, currencies, days and months."""
    from babel import Locale

    locale = Locale(language)
    days = {str(number): name for number, name in locale.days["stand-alone"]["wide"].items()}
    months = {str(number): name for number, name in locale.months["stand-alone"]["wide"].items()}
    territories = dict(locale.territories) | {"en": {"TR": "Turkey"}}.get(language, {})
    return {
        "territories": territories,
        "languages": dict(locale.languages),
        "currencies": dict(locale.currencies),
        "days": days,
        "months": months,
    }


def country(code: str, language: str) -> str:
    return names(language)["territories"][code]


def capital(code: str, language: str) -> str:
    return COUNTRIES[code][0 if language == "zh" else 1]


def continent(code: str, language: str) -> str:
    return CONTINENTS[COUNTRIES[code][2]][0 if language == "zh" else 1]
