"""The function families behind the code and edit categories, as one table.

`{v}` is the argument (`{w}` the second one), `{c}` and `{d}` are constants. A family's constants
are listed by kind: num (3..99), small (2..9), letter, mark, tag, or - for none; two nums ascend.
"""

import re
from dataclasses import dataclass
from typing import Literal

Argument = Literal["numbers", "words", "text", "number", "pair", "table"]


@dataclass(frozen=True)
class Family:
    """One kind of function: names to choose from, the argument, constants, comment and body."""

    names: str
    argument: Argument
    constants: str
    comment: str
    body: str


NAMES_OF: dict[Argument, tuple[str, ...]] = {
    "numbers": ("xs", "items", "values", "numbers", "nums", "data"),
    "words": ("words", "names", "tokens", "strings", "lines", "parts"),
    "text": ("s", "text", "word", "line", "name", "title"),
    "number": ("n", "num", "value", "size", "count", "k"),
    "pair": ("a, b", "p, q", "m, n", "i, j", "left, right", "first, last"),
    "table": ("d", "table", "prices", "scores", "ages", "stock"),
}


def _rows(argument: Argument, table: str) -> tuple[Family, ...]:
    """Read entries of one line `names | constants | comment` and an indented body."""
    rows = []
    for entry in re.split(r"\n(?=\S)", table.strip()):
        head, body = entry.split("\n", 1)
        names, constants, comment = head.split(" | ")
        rows.append(Family(names, argument, constants, comment, body))
    return tuple(rows)


NUMBERS = """
above keep_above | num | Return the items of {v} that are greater than {c}.
    return [x for x in {v} if x > {c}]
below keep_below | num | Return the items of {v} that are less than {c}.
    return [x for x in {v} if x < {c}]
at_least | num | Return the items of {v} that are at least {c}.
    return [x for x in {v} if x >= {c}]
at_most | num | Return the items of {v} that are at most {c}.
    return [x for x in {v} if x <= {c}]
between in_range | num num | Return the items of {v} from {c} to {d}.
    return [x for x in {v} if {c} <= x <= {d}]
without drop | num | Return {v} without the items equal to {c}.
    return [x for x in {v} if x != {c}]
multiples | num | Return the multiples of {c} in {v}.
    return [x for x in {v} if x % {c} == 0]
sum_above | num | Return the sum of the items of {v} greater than {c}.
    return sum(x for x in {v} if x > {c})
sum_below | num | Return the sum of the items of {v} less than {c}.
    return sum(x for x in {v} if x < {c})
count_above | num | Count the items of {v} greater than {c}.
    return sum(1 for x in {v} if x > {c})
count_below | num | Count the items of {v} less than {c}.
    return sum(1 for x in {v} if x < {c})
count_equal | num | Count how often {c} is in {v}.
    return {v}.count({c})
scale times | num | Multiply every item of {v} by {c}.
    return [x * {c} for x in {v}]
shift add_all | num | Add {c} to every item of {v}.
    return [x + {c} for x in {v}]
lower_all | num | Subtract {c} from every item of {v}.
    return [x - {c} for x in {v}]
scale_shift | num num | Multiply every item of {v} by {c} and add {d}.
    return [x * {c} + {d} for x in {v}]
scale_above | num num | Multiply the items of {v} greater than {c} by {d}.
    return [x * {d} for x in {v} if x > {c}]
sum_between | num num | Return the sum of the items of {v} from {c} to {d}.
    return sum(x for x in {v} if {c} <= x <= {d})
replace_item | num num | Replace {c} by {d} in {v}.
    return [{d} if x == {c} else x for x in {v}]
cap | num | Replace items of {v} greater than {c} by {c}.
    return [min(x, {c}) for x in {v}]
floor_at | num | Replace items of {v} less than {c} by {c}.
    return [max(x, {c}) for x in {v}]
any_above | num | Check if any item of {v} is greater than {c}.
    return any(x > {c} for x in {v})
all_below | num | Check if all items of {v} are less than {c}.
    return all(x < {c} for x in {v})
contains has | num | Check if {c} is in {v}.
    return {c} in {v}
first_above | num | Return the first item of {v} greater than {c}, or None.
    for x in {v}:
        if x > {c}:
            return x
    return None
largest_below | num | Return the largest item of {v} smaller than {c}.
    return max((x for x in {v} if x < {c}), default=None)
find | num | Return the index of {c} in {v}, or -1.
    if {c} in {v}:
        return {v}.index({c})
    return -1
add_item | num | Add {c} to the end of {v}.
    return {v} + [{c}]
total_from | num | Return {c} plus the sum of {v}.
    total = {c}
    for x in {v}:
        total += x
    return total
take first_items | small | Return the first {c} items of {v}.
    return {v}[:{c}]
last_items | small | Return the last {c} items of {v}.
    return {v}[-{c}:]
every | small | Take one of every {c} items of {v}.
    return {v}[::{c}]
times_table | num | Map each item of {v} to the item times {c}.
    return {x: x * {c} for x in {v}}
total | - | Return the sum of {v}.
    total = 0
    for x in {v}:
        total += x
    return total
evens | - | Return the even items of {v}.
    return [x for x in {v} if x % 2 == 0]
largest | - | Return the largest item of {v}, or None.
    return max({v}, default=None)
sort_down | - | Sort {v} from high to low.
    return sorted({v}, reverse=True)
"""
WORDS = """
longer_than | num | Return the strings in {v} longer than {c}.
    return [w for w in {v} if len(w) > {c}]
starting_with | letter | Return the strings in {v} that start with "{c}".
    return [w for w in {v} if w.startswith("{c}")]
count_with | letter | Count the strings in {v} that contain "{c}".
    return sum(1 for w in {v} if "{c}" in w)
add_tag tag_all | tag | Add "{c}" to every string in {v}.
    return [w + "{c}" for w in {v}]
join_with | mark | Join {v} with "{c}".
    return "{c}".join({v})
lengths | - | Map each string in {v} to its length.
    return {w: len(w) for w in {v}}
upper_all | - | Make every string in {v} upper case.
    return [w.upper() for w in {v}]
longest | - | Return the longest string in {v}.
    best = ""
    for w in {v}:
        if len(w) > len(best):
            best = w
    return best
"""
TEXT = """
is_long | num | Check if {v} is longer than {c}.
    return len({v}) > {c}
repeat | num | Repeat {v} {c} times.
    return {v} * {c}
start_of | num | Return the first {c} letters of {v}.
    return {v}[:{c}]
end_of | num | Return the last {c} letters of {v}.
    return {v}[-{c}:]
fill pad | num | Fill {v} with spaces to {c} letters.
    return {v}.ljust({c})
shorten | num | Cut {v} after {c} letters and add "..." if it is longer.
    if len({v}) > {c}:
        return {v}[:{c}] + "..."
    return {v}
count_letter | letter | Count the letter "{c}" in {v}.
    return {v}.count("{c}")
remove_letter | letter | Remove the letter "{c}" from {v}.
    return {v}.replace("{c}", "")
swap_letter | letter letter | Replace "{c}" by "{d}" in {v}.
    return {v}.replace("{c}", "{d}")
split_at | mark | Split {v} at "{c}".
    return {v}.split("{c}")
add_end | tag | Add "{c}" to the end of {v}.
    return {v} + "{c}"
add_start | tag | Add "{c}" to the start of {v}.
    return "{c}" + {v}
reverse | - | Return {v} backwards.
    return {v}[::-1]
is_palindrome | - | Check if {v} reads the same backwards.
    return {v} == {v}[::-1]
count_letters | - | Count each letter of {v}.
    counts = {}
    for x in {v}:
        counts[x] = counts.get(x, 0) + 1
    return counts
"""
NUMBER = """
level grade | num | Return "high" if {v} is greater than {c}, else "low".
    if {v} > {c}:
        return "high"
    return "low"
is_small | num | Check if {v} is less than {c}.
    return {v} < {c}
is_multiple | num | Check if {v} is a multiple of {c}.
    return {v} % {c} == 0
add plus | num | Add {c} to {v}.
    return {v} + {c}
scale_by | num num | Multiply {v} by {c} and add {d}.
    return {v} * {c} + {d}
distance | num | Return the distance from {v} to {c}.
    return abs({v} - {c})
clamp limit | num num | Keep {v} between {c} and {d}.
    return min(max({v}, {c}), {d})
is_between | num num | Check if {v} is from {c} to {d}.
    return {c} <= {v} <= {d}
at_least_value | num | Return {v}, but at least {c}.
    if {v} < {c}:
        return {c}
    return {v}
remainder | num | Return the remainder of {v} divided by {c}.
    return {v} % {c}
count_up | small | List {c} numbers from {v} up.
    return list(range({v}, {v} + {c}))
table_of | small | Map 1 to {v} to the number times {c}.
    return {i: i * {c} for i in range(1, {v} + 1)}
sum_to | num | Sum the multiples of {c} up to {v}.
    total = 0
    for i in range(0, {v} + 1, {c}):
        total += i
    return total
is_even | - | Check if {v} is even.
    return {v} % 2 == 0
sum_up | - | Sum the numbers from 1 to {v}.
    return sum(range(1, {v} + 1))
"""
PAIR = """
add_both | num | Return {v} plus {w} plus {c}.
    return {v} + {w} + {c}
product_less | num | Return {v} times {w} minus {c}.
    return {v} * {w} - {c}
both_above | num | Check if {v} and {w} are greater than {c}.
    return {v} > {c} and {w} > {c}
weighted | num num | Return {c} times {v} plus {d} times {w}.
    return {c} * {v} + {d} * {w}
sum_above_limit | num | Check if {v} plus {w} is greater than {c}.
    return {v} + {w} > {c}
larger | - | Return the larger of {v} and {w}.
    if {v} > {w}:
        return {v}
    return {w}
"""
TABLE = """
value_of lookup | tag num | Return the value of "{c}" in {v}, or {d}.
    return {v}.get("{c}", {d})
keys_above | num | Return the keys of {v} with values above {c}.
    return [k for k in {v} if {v}[k] > {c}]
raise_all | num | Add {c} to every value of {v}.
    return {k: {v}[k] + {c} for k in {v}}
set_key put | tag num | Set "{c}" to {d} in {v}.
    {v}["{c}"] = {d}
    return {v}
swap_keys | - | Swap the keys and values of {v}.
    return {{v}[k]: k for k in {v}}
"""
FAMILIES = (
    _rows("numbers", NUMBERS)
    + _rows("words", WORDS)
    + _rows("text", TEXT)
    + _rows("number", NUMBER)
    + _rows("pair", PAIR)
    + _rows("table", TABLE)
)
