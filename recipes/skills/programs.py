"""Short Python programs: what each does in Chinese and English, its code, its test and an explanation."""

from __future__ import annotations

from dataclasses import dataclass

SORTS = "a = [3, 6, 1, 8, 1]; assert (f(a) or a) == [1, 1, 3, 6, 8]"  # in place or not


@dataclass(frozen=True)
class Program:
    """``zh`` and ``en``: names of the task, which follow "write …". ``test`` runs after the code; in it, ``f``
    is the function or class of the program."""

    zh: tuple[str, ...]
    en: tuple[str, ...]
    code: str
    test: str
    why_zh: str
    why_en: str


def _program(zh: str, en: str, code: str, test: str, why_zh: str, why_en: str) -> Program:
    return Program(tuple(zh.split("|")), tuple(en.split("|")), code.strip("\n"), test, why_zh, why_en)


PROGRAMS = [
    _program(
        "快速排序|快排|快速排序算法|快速排序函数", "quicksort|quick sort|a quicksort function|the quicksort algorithm",
        """
def quicksort(a):
    if len(a) <= 1:
        return a
    p = a[0]
    left = [x for x in a[1:] if x < p]
    right = [x for x in a[1:] if x >= p]
    return quicksort(left) + [p] + quicksort(right)
""",
        SORTS,
        "取第一个数作基准，把小的放左边，大的放右边，再分别排序。",
        "It takes the first number as pivot, puts smaller ones left and larger ones right, and sorts both.",
    ),
    _program(
        "冒泡排序|冒泡排序算法|冒泡排序函数", "bubble sort|a bubble sort|a bubble sort function",
        """
def bubble_sort(a):
    for i in range(len(a)):
        for j in range(len(a) - 1 - i):
            if a[j] > a[j + 1]:
                a[j], a[j + 1] = a[j + 1], a[j]
    return a
""",
        SORTS,
        "相邻的数两两比较，顺序不对就交换。", "It compares neighbours and swaps them if they are in the wrong order.",
    ),
    _program(
        "插入排序|插入排序算法|插入排序函数", "insertion sort|an insertion sort|an insertion sort function",
        """
def insertion_sort(a):
    b = []
    for x in a:
        i = 0
        while i < len(b) and b[i] < x:
            i += 1
        b.insert(i, x)
    return b
""",
        SORTS,
        "把每个数插入到已排好的部分中。", "It inserts each number into the part that is already sorted.",
    ),
    _program(
        "选择排序|选择排序算法|选择排序函数", "selection sort|a selection sort|a selection sort function",
        """
def selection_sort(a):
    a = list(a)
    b = []
    while a:
        m = min(a)
        a.remove(m)
        b.append(m)
    return b
""",
        SORTS,
        "每次取出最小的数，放到结果的末尾。", "It takes out the smallest number again and again.",
    ),
    _program(
        "归并排序|归并排序算法|合并排序", "merge sort|a merge sort|a merge sort function",
        """
def merge_sort(a):
    if len(a) <= 1:
        return a
    m = len(a) // 2
    x, y = merge_sort(a[:m]), merge_sort(a[m:])
    b = []
    while x and y:
        b.append(x.pop(0) if x[0] < y[0] else y.pop(0))
    return b + x + y
""",
        SORTS,
        "把列表分成两半，分别排序，再合并。", "It sorts both halves of the list and merges them.",
    ),
    _program(
        "二分查找|二分搜索|二分查找函数", "binary search|a binary search|a binary search function",
        """
def binary_search(a, x):
    low, high = 0, len(a) - 1
    while low <= high:
        m = (low + high) // 2
        if a[m] == x:
            return m
        if a[m] < x:
            low = m + 1
        else:
            high = m - 1
    return -1
""",
        "assert f([1, 3, 5, 8], 5) == 2 and f([1, 3], 2) == -1",
        "每次看中间的数，把查找范围缩小一半。", "It looks at the middle and halves the range each time.",
    ),
    _program(
        "求阶乘的函数|阶乘|计算阶乘的程序", "factorial|a factorial function|a function for the factorial of n",
        """
def factorial(n):
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result
""",
        "assert f(5) == 120 and f(0) == 1",
        "从2乘到n。", "It multiplies the numbers from 2 to n.",
    ),
    _program(
        "斐波那契数列|求斐波那契数的函数|计算斐波那契数列的程序",
        "fibonacci|a Fibonacci function|a function for the nth Fibonacci number",
        """
def fibonacci(n):
    a, b = 0, 1
    for i in range(n):
        a, b = b, a + b
    return a
""",
        "assert [f(n) for n in range(7)] == [0, 1, 1, 2, 3, 5, 8]",
        "每个数是前两个数的和。", "Each number is the sum of the two before it.",
    ),
    _program(
        "判断质数的函数|判断素数的程序|检查一个数是不是质数的函数",
        "a prime test|a function that checks whether a number is prime|is_prime",
        """
def is_prime(n):
    if n < 2:
        return False
    for i in range(2, n):
        if n % i == 0:
            return False
    return True
""",
        "assert [n for n in range(12) if f(n)] == [2, 3, 5, 7, 11]",
        "如果n能被某个更小的数整除，它就不是质数。", "If a smaller number divides n, it is not prime.",
    ),
    _program(
        "求最大公约数的函数|最大公约数|计算最大公约数的程序",
        "gcd|a function for the greatest common divisor|the Euclidean algorithm",
        """
def gcd(a, b):
    while b:
        a, b = b, a % b
    return a
""",
        "assert f(12, 18) == 6 and f(7, 3) == 1",
        "这是辗转相除法：不断用余数去除，直到余数为0。", "It divides by the remainder until the remainder is 0.",
    ),
    _program(
        "反转字符串的函数|把字符串倒过来的程序|字符串反转",
        "a function that reverses a string|string reversal|a program to reverse a string",
        """
def reverse(s):
    return s[::-1]
""",
        "assert f('abc') == 'cba'",
        "切片[::-1]从后往前取字符。", "The slice [::-1] takes the characters from the end.",
    ),
    _program(
        "判断回文的函数|回文判断|检查字符串是不是回文的程序",
        "a palindrome check|a function that checks for palindromes|is_palindrome",
        """
def is_palindrome(s):
    return s == s[::-1]
""",
        "assert f('level') and not f('ab')",
        "正着读和反着读一样，就是回文。", "A palindrome reads the same backwards.",
    ),
    _program(
        "求列表之和的函数|计算列表总和的程序|列表求和", "a function that sums a list|the sum of a list|list sum",
        """
def total(a):
    s = 0
    for x in a:
        s += x
    return s
""",
        "assert f([1, 2, 3]) == 6",
        "把每个数依次加到s上。", "It adds each number to s.",
    ),
    _program(
        "求列表最大值的函数|找最大数的程序|找出列表中最大的数的函数",
        "a function that finds the largest number in a list|the maximum of a list|a program to find the maximum",
        """
def largest(a):
    m = a[0]
    for x in a:
        if x > m:
            m = x
    return m
""",
        "assert f([3, 9, 2]) == 9",
        "m记住目前最大的数。", "m keeps the largest number so far.",
    ),
    _program(
        "求列表最小值的函数|找最小数的程序|找出列表中最小的数的函数",
        "a function that finds the smallest number in a list|the minimum of a list|a program to find the minimum",
        """
def smallest(a):
    m = a[0]
    for x in a:
        if x < m:
            m = x
    return m
""",
        "assert f([3, 9, 2]) == 2",
        "m记住目前最小的数。", "m keeps the smallest number so far.",
    ),
    _program(
        "求平均数的函数|计算平均值的程序|求平均值的函数",
        "a function for the average of a list|the mean of a list|average",
        """
def average(a):
    return sum(a) / len(a)
""",
        "assert f([1, 2, 3]) == 2",
        "总和除以个数。", "It divides the sum by the count.",
    ),
    _program(
        "统计元音字母的函数|数元音的程序|数一数元音个数的函数",
        "a function that counts vowels|a vowel counter|a program that counts vowels",
        """
def count_vowels(s):
    return sum(c in "aeiou" for c in s.lower())
""",
        "assert f('Apple') == 2",
        "它数出a、e、i、o、u的个数。", "It counts the letters a, e, i, o and u.",
    ),
    _program(
        "统计单词数的函数|数单词的程序|数一句话有几个单词的函数",
        "a function that counts words|a word counter|a program that counts the words of a sentence",
        """
def count_words(s):
    return len(s.split())
""",
        "assert f('one two three') == 3",
        "split按空格把句子分开。", "split cuts the sentence at blanks.",
    ),
    _program(
        "FizzBuzz|FizzBuzz程序|FizzBuzz函数", "FizzBuzz|a FizzBuzz program|a FizzBuzz function",
        """
def fizzbuzz(n):
    if n % 15 == 0:
        return "FizzBuzz"
    if n % 3 == 0:
        return "Fizz"
    if n % 5 == 0:
        return "Buzz"
    return str(n)
""",
        "assert [f(n) for n in (1, 3, 5, 15)] == ['1', 'Fizz', 'Buzz', 'FizzBuzz']",
        "先检查15，再检查3和5。", "It checks 15 first, then 3 and 5.",
    ),
    _program(
        "去除列表重复元素的函数|列表去重|去掉重复元素的程序",
        "a function that removes duplicates from a list|list deduplication|a program that removes duplicates",
        """
def unique(a):
    b = []
    for x in a:
        if x not in b:
            b.append(x)
    return b
""",
        "assert f([1, 2, 1, 3]) == [1, 2, 3]",
        "只保留第一次出现的元素。", "It keeps each element once.",
    ),
    _program(
        "判断闰年的函数|闰年判断|检查是不是闰年的程序",
        "a leap year check|a function that checks for leap years|is_leap",
        """
def is_leap(y):
    return y % 4 == 0 and (y % 100 != 0 or y % 400 == 0)
""",
        "assert f(2024) and not f(1900) and f(2000)",
        "能被4整除但不能被100整除，或者能被400整除。", "Divisible by 4 and not by 100, or divisible by 400.",
    ),
    _program(
        "判断偶数的函数|判断奇偶的程序|检查一个数是不是偶数的函数",
        "a function that checks whether a number is even|an even check|is_even",
        """
def is_even(n):
    return n % 2 == 0
""",
        "assert f(4) and not f(3)",
        "除以2余0就是偶数。", "A number is even if n % 2 is 0.",
    ),
    _program(
        "摄氏度转华氏度的函数|温度转换程序|把摄氏度换成华氏度的函数",
        "a function that converts Celsius to Fahrenheit|a temperature converter|Celsius to Fahrenheit",
        """
def to_fahrenheit(c):
    return c * 9 / 5 + 32
""",
        "assert f(100) == 212",
        "乘以9/5，再加32。", "It multiplies by 9/5 and adds 32.",
    ),
    _program(
        "求1到n之和的函数|计算1到n的和的程序|从1加到n的函数",
        "a function that sums the numbers from 1 to n|the sum from 1 to n|a program that adds 1 to n",
        """
def sum_to(n):
    return n * (n + 1) // 2
""",
        "assert f(100) == 5050",
        "用公式n(n+1)/2。", "It uses the formula n(n+1)/2.",
    ),
    _program(
        "统计字符出现次数的函数|统计字母个数的程序|数每个字符出现几次的函数",
        "a function that counts each character|a character counter|a program that counts letters",
        """
def count_chars(s):
    d = {}
    for c in s:
        d[c] = d.get(c, 0) + 1
    return d
""",
        "assert f('aab') == {'a': 2, 'b': 1}",
        "字典d记录每个字符的次数。", "The dictionary d holds the count of each character.",
    ),
    _program(
        "栈|栈的类|用列表实现的栈", "a stack|a stack class|a class for a stack",
        """
class Stack:
    def __init__(self):
        self.a = []
    def push(self, x):
        self.a.append(x)
    def pop(self):
        return self.a.pop()
""",
        "s = f(); s.push(1); s.push(2); assert s.pop() == 2 and s.pop() == 1",
        "后放入的元素先取出。", "The last element in is the first one out.",
    ),
    _program(
        "队列|队列的类|用列表实现的队列", "a queue|a queue class|a class for a queue",
        """
class Queue:
    def __init__(self):
        self.a = []
    def push(self, x):
        self.a.append(x)
    def pop(self):
        return self.a.pop(0)
""",
        "q = f(); q.push(1); q.push(2); assert q.pop() == 1 and q.pop() == 2",
        "先放入的元素先取出。", "The first element in is the first one out.",
    ),
    _program(
        "求两数最大值的函数|比较两个数大小的函数|返回较大数的函数",
        "a function that returns the larger of two numbers|the maximum of two numbers|larger",
        """
def larger(a, b):
    return a if a > b else b
""",
        "assert f(2, 5) == 5 and f(5, 2) == 5",
        "如果a更大就返回a，否则返回b。", "It returns a if a is larger, otherwise b.",
    ),
    _program(
        "求各位数字之和的函数|数字求和程序|把一个数的各位数字相加的函数",
        "a function that sums the digits of a number|digit sum|a program that adds the digits of a number",
        """
def digit_sum(n):
    return sum(int(d) for d in str(n))
""",
        "assert f(123) == 6",
        "把数变成字符串，再逐位相加。", "It turns the number into text and adds its digits.",
    ),
    _program(
        "交换两个变量的代码|交换两个数的函数|变量交换", "a swap function|code that swaps two values|swap",
        """
def swap(a, b):
    return b, a
""",
        "assert f(1, 2) == (2, 1)",
        "Python可以同时返回两个值。", "Python can return two values at once.",
    ),
    _program(
        "十进制转二进制的函数|二进制转换程序|把整数变成二进制的函数",
        "a function that converts a number to binary|decimal to binary|a binary converter",
        """
def to_binary(n):
    s = ""
    while n > 0:
        s = str(n % 2) + s
        n //= 2
    return s or "0"
""",
        "assert f(10) == '1010' and f(0) == '0'",
        "不断除以2，余数从后往前排。", "It divides by 2 and collects the remainders.",
    ),
    _program(
        "求圆面积的函数|计算圆的面积的程序|圆面积", "a function for the area of a circle|circle area|the area of a circle",
        """
import math

def circle_area(r):
    return math.pi * r ** 2
""",
        "assert abs(f(2) - 12.566) < 0.01",
        "面积是π乘以半径的平方。", "The area is pi times the radius squared.",
    ),
    _program(
        "求矩形面积的函数|计算长方形面积的程序|长方形面积",
        "a function for the area of a rectangle|rectangle area|the area of a rectangle",
        """
def rectangle_area(a, b):
    return a * b
""",
        "assert f(3, 4) == 12",
        "面积是长乘以宽。", "The area is length times width.",
    ),
    _program(
        "打招呼的程序|Hello World|打印Hello World的程序", "hello world|a hello world program|Hello World in Python",
        """
print("Hello, World!")
""",
        "",
        "print把文字显示出来。", "print shows the text.",
    ),
    _program(
        "把列表反过来的函数|列表反转|反转列表的程序", "a function that reverses a list|list reversal|a program to reverse a list",
        """
def reverse_list(a):
    return a[::-1]
""",
        "assert f([1, 2, 3]) == [3, 2, 1]",
        "切片[::-1]从后往前取元素。", "The slice [::-1] takes the elements from the end.",
    ),
    _program(
        "线性查找|顺序查找|在列表中查找元素的函数", "linear search|a linear search|a function that finds an element in a list",
        """
def find(a, x):
    for i in range(len(a)):
        if a[i] == x:
            return i
    return -1
""",
        "assert f([4, 5, 6], 6) == 2 and f([1], 2) == -1",
        "从头到尾逐个比较。", "It compares the elements one by one.",
    ),
]  # fmt: skip
