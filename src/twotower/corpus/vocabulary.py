"""Names, things and places that several categories put into their text."""

MEN = tuple(
    "Tom Ben Sam Max Leo Jack Adam Paul Mark Luke David Peter Oscar Hugo Felix Omar Ivan Karl "
    "Noah Eric".split()
)
WOMEN = tuple(
    "Ann Eva Mia Lucy Emma Sara Nina Lisa Kate Rosa Julia Maria Clara Alice Helen Laura Diana "
    "Olga Irene Zoe".split()
)
NAMES = MEN + WOMEN
THINGS = tuple(
    "apples pens books cards coins stamps shells marbles stickers pencils oranges eggs cookies "
    "balls flowers toys buttons lemons nuts keys".split()
)
CITIES = (
    *"Paris Rome Berlin Madrid London Tokyo Oslo Vienna Prague Lisbon Dublin Athens Cairo Lima "
    "Boston Denver Chicago Seattle Miami Toronto Sydney Delhi Seoul Hanoi Nairobi Warsaw Milan "
    "Munich Geneva Zurich Porto Lyon Turin Bergen Quito Havana Dallas Austin Osaka Kyoto".split(),
)
