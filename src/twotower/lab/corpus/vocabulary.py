"""Names, things and places that several categories put into their text."""


def word_list(text: str) -> tuple[str, ...]:
    """Split at white space: lists of words stay readable without a quote around each."""
    return tuple(text.split())


MEN = word_list(
    "Tom Ben Sam Max Leo Jack Adam Paul Mark Luke David Peter Oscar Hugo Felix Omar Ivan Karl "
    "Noah Eric"
)
WOMEN = word_list(
    "Ann Eva Mia Lucy Emma Sara Nina Lisa Kate Rosa Julia Maria Clara Alice Helen Laura Diana "
    "Olga Irene Zoe"
)
NAMES = MEN + WOMEN
THINGS = word_list(
    "apples pens books cards coins stamps shells marbles stickers pencils oranges eggs cookies "
    "balls flowers toys buttons lemons nuts keys"
)
CITIES = word_list(
    "Paris Rome Berlin Madrid London Tokyo Oslo Vienna Prague Lisbon Dublin Athens Cairo Lima "
    "Boston Denver Chicago Seattle Miami Toronto Sydney Delhi Seoul Hanoi Nairobi Warsaw Milan "
    "Munich Geneva Zurich Porto Lyon Turin Bergen Quito Havana Dallas Austin Osaka Kyoto"
)
