"""Prompts of chats and of code: python make_prompts.py chat.jsonl code.jsonl

Made of templates and topics: training text of the denoiser beside this file, together with
questions that people wrote. None is of a benchmark. The same two files come out every time.
"""

import json
import random
import sys
from collections.abc import Sequence

TOPICS = (
    "photosynthesis|the water cycle|black holes|vaccines|the French Revolution|the Silk Road"
    "|inflation"
    "|supply and demand|plate tectonics|DNA|the immune system|electric cars|solar panels|batteries"
    "|neural networks|databases|encryption|the internet|climate change|coral reefs|bees|volcanoes"
    "|the Roman Empire|the Renaissance|jazz|impressionism|haiku|chess|marathon running|yoga|sleep"
    "|healthy breakfasts|bread baking|coffee|green tea|gardening|recycling|public transport|cycling"
    "|remote work|job interviews|time management|saving money|learning a language|reading habits"
    "|friendship|stress|public speaking|small businesses|online shops|mobile phones|social media"
    "|space travel|the moon|gravity|sound|light|magnets|acids and bases|atoms|probability|fractions"
    "|prime numbers|maps|rivers|deserts|rain forests|whales|dogs|cats|birds|museums"
    "|libraries|cinema"
    "|theatre|poetry|fairy tales|myths|democracy|human rights|voting|taxes|insurance|first aid"
)
PLACES = "Japan|Italy|Kenya|Peru|Iceland|Paris|New York|Cairo|Sydney|a mountain village|the sea"
ROLES = (
    "a teacher|a doctor|a pirate|a detective|a chef|a tour guide|a travel agent|a coach|a scientist"
    "|a historian|a librarian|a sailor|a farmer|an astronaut|a robot|a king|a lawyer|an engineer"
)
CHAT = (
    "Explain {topic} to a child.|What is {topic}?|Why does {topic} matter?"
    "|Give me five facts about {topic}."
    "|Write a short paragraph about {topic}.|Write a short story about {topic}."
    "|Write a poem about {topic}."
    "|What are the advantages and disadvantages of {topic}?|How does {topic} work?"
    "|Compare {topic} and {other}.|Write an email to a friend about {topic}."
    "|I want to know more about {topic}. Where should I start?"
    "|List three common mistakes about {topic}."
    "|Give me a plan for a one-hour lesson about {topic}.|Summarise the history of {topic}."
    "|Write a blog post about {topic} and {other}.|What questions could I ask an expert on {topic}?"
    "|Imagine you are {role}. Tell me about {topic}."
    "|You are {role} from {place}. Introduce yourself."
    "|Write a dialogue between {role} and {another} about {topic}.|Plan a weekend in {place}."
    "|What should I eat in {place}?|Write a letter from {role} in {place}."
    "|How would {role} explain {topic}?"
    "|Write a product description for something to do with {topic}.|Invent a game about {topic}."
    "|What would happen without {topic}? Think step by step.|Describe a day of {role} in {place}."
    "|Rewrite this sentence more politely: tell me all about {topic} now."
    "|Name the most important words in this sentence: {role} from {place} wrote about {topic}."
)
THINGS = "numbers|words|strings|names|prices|scores|lines|records|temperatures|dates"
TASKS = (
    "returns the largest of a list of {things}|returns the smallest of a list of {things}"
    "|counts how often each of the {things} occurs|removes duplicates from a list of {things}"
    "|reverses a list of {things}|sorts {things} in descending order"
    "|merges two sorted lists of {things}"
    "|checks whether a list of {things} is sorted|splits a list of {things} into chunks of size n"
    "|returns the {things} at even positions|finds the two most similar {things}"
    "|reads {things} from a file|writes {things} to a CSV file|rotates a list of {things} by k"
    "|groups {things} by their first character|returns the median of {things}"
    "|returns the n-th Fibonacci number|checks whether a number is prime|computes a factorial"
    "|checks whether a string is a palindrome|counts the vowels of a string|counts words in a text"
    "|converts Celsius to Fahrenheit|flattens a nested list|finds the longest word of a sentence"
    "|computes the greatest common divisor of two numbers|checks balanced brackets"
    "|inverts a dictionary"
    "|capitalises every word|sums the digits of an integer|converts an integer to binary"
    "|implements binary search|implements bubble sort|implements a stack|implements a queue"
)
CODE = (
    "Write a Python function that {task}.|Write a function in JavaScript that {task}."
    '|Complete this Python code:\n\ndef {name}({argument}):\n    """A function that {task}."""\n'
    "|Write a Python function that {task}, with a docstring and an example."
    "|How can I write code that {task}?|Write a unit test for a Python function that {task}."
    "|Explain step by step how a program {task}."
)
NAMES, ARGUMENTS = (
    "solve|compute|process|helper|run_task",
    "values|items|data|text|numbers: list[int]",
)


def made(templates: str, count: int, seed: int, **words: str) -> list[str]:
    """`count` different prompts: random words in random templates."""
    draw, found = random.Random(seed), dict[str, None]()
    choices = {name: text.split("|") for name, text in words.items()}
    while len(found) < count:
        chosen = {name: draw.choice(options) for name, options in choices.items()}
        if "task" in chosen:
            chosen["task"] = chosen["task"].format(things=draw.choice(THINGS.split("|")))
        found[draw.choice(templates.split("|")).format(**chosen)] = None
    return list(found)


def write(file: str, prompts: Sequence[str]) -> None:
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)


if __name__ == "__main__":
    chat_file, code_file = sys.argv[1:]
    write(
        chat_file,
        made(CHAT, 3000, 1, topic=TOPICS, other=TOPICS, role=ROLES, another=ROLES, place=PLACES),
    )
    write(code_file, made(CODE, 1000, 2, task=TASKS, name=NAMES, argument=ARGUMENTS))
