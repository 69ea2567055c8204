"""Personal data: e-mail, public IP addresses, phone, card and identity numbers become placeholders.

Numbers are verified: cards by Luhn digit and issuer prefix, Chinese identity numbers by date and check digit
(GB 11643), IBANs by ISO 7064, IP addresses by being public. Telephone numbers are recognised by their
notation: with +, with separators, after a word for them, or as a Chinese mobile number.
"""

from __future__ import annotations

import datetime
import ipaddress
import re

EMAIL, PHONE, IP, CARD, IDENTITY, IBAN = "<email>", "<phone>", "<ip>", "<card>", "<id>", "<iban>"

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b",
    re.ASCII,
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])", re.ASCII)
_IDENTITY = re.compile(
    r"(?<![0-9A-Za-z])[1-9]\d{5}(?:19|20)\d{2}[01]\d[0-3]\d\d{3}[0-9Xx](?![0-9A-Za-z])", re.ASCII
)
_CARD = re.compile(
    r"(?<![\w.-])(?:(?:[3-6]\d{3}|2[2-7]\d{2})(?:[ -]?\d{4}){2}[ -]?\d{3,4}|3[47]\d{2}[ -]?\d{6}[ -]?\d{5})"
    r"(?![\w-]|\.\d)",
    re.ASCII,
)
_IBAN = re.compile(
    r"(?<![0-9A-Za-z])[A-Z]{2}\d{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,4})?(?![0-9A-Za-z])", re.ASCII
)
_PHONE = re.compile(
    r"(?<![\w.+/=-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # +49 30 1234567
    r"|\(\d{2,4}\)[ -]?\d{3,4}[ -]\d{4}"  # (555) 123-4567
    r"|\d{3}-\d{3}-\d{4}"  # 555-123-4567
    r"|(?:86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}"  # 138 1234 5678
    r"|0\d{2,3}-\d{7,8}"  # 010-12345678
    r")(?![\w-]|\.\d)",
    re.ASCII,
)
_SPOKEN = re.compile(
    r"((?:电话|手机|联系方式|電話|携帯|전화|연락처|โทร|тел|telefon|téléphone|tel|phone|mobile|whatsapp)"
    r"[\s.:：号番]{1,4})(\(?\d[\d ()./-]{5,18}\d)(?![\w])",
    re.IGNORECASE,
)
_DIGITS = re.compile(r"\d[\d .()-]{5}", re.ASCII)


def scrub(text: str) -> tuple[str, dict[str, int]]:
    """The text with placeholders for personal data, and the number of each kind."""
    counts: dict[str, int] = {}

    def put(mark: str) -> str:
        counts[mark] = counts.get(mark, 0) + 1
        return mark

    if "@" in text:
        text = _EMAIL.sub(lambda match: put(EMAIL), text)
    if text.count(":") > 1:
        text = _IPV6.sub(lambda match: put(IP) if _public(match[0]) else match[0], text)
    if not _DIGITS.search(text):
        return text, counts
    text = _IPV4.sub(lambda match: put(IP) if _public(match[0]) else match[0], text)
    text = _IDENTITY.sub(lambda match: put(IDENTITY) if is_identity(match[0]) else match[0], text)
    text = _IBAN.sub(lambda match: put(IBAN) if is_iban(match[0]) else match[0], text)
    text = _CARD.sub(lambda match: put(CARD) if is_card(match[0]) else match[0], text)
    text = _PHONE.sub(lambda match: put(PHONE) if _phone_digits(match[0]) else match[0], text)
    text = _SPOKEN.sub(lambda match: match[1] + (put(PHONE) if _phone_digits(match[2]) else match[2]), text)
    return text, counts


def is_card(text: str) -> bool:
    """Whether the digits in a text pass Luhn's check (ISO/IEC 7812-1) and are not all equal."""
    digits = [int(character) for character in text if character.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 2:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_identity(text: str) -> bool:
    """Whether 18 characters are a Chinese identity number: a valid date of birth and check digit."""
    try:
        datetime.date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    weights = [2 ** (17 - place) % 11 for place in range(17)]
    total = sum(int(digit) * weight for digit, weight in zip(text[:17], weights, strict=True))
    return text[17].upper() == "10X98765432"[total % 11]


def is_iban(text: str) -> bool:
    """Whether a text is an IBAN: the remainder of ISO 13616 is 1."""
    plain = text.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def _public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _phone_digits(text: str) -> bool:
    digits = "".join(filter(str.isdigit, text))
    return 7 <= len(digits) <= 15 and len(set(digits)) > 2
