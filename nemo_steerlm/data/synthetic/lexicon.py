"""Vocabulary of the synthetic dialogue world: eight domains of ten things each, and words that colour an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing users ask about.

    Attributes:
        text: The word, in the one form in which the world uses it.
        number: `singular` and `mass` take singular verbs and `it`, `plural` takes plural verbs and `them`.
    """

    text: str
    number: str

    @property
    def plural(self) -> bool:
        """Whether verbs and pronouns must be plural."""
        return self.number == "plural"


@dataclass(frozen=True, slots=True)
class Domain:
    """One subject: its things, what one does to them, with what, for how long, and how users ask.

    Attributes:
        name: Name of the domain.
        nouns: The things users ask about.
        determiners: Words that may stand before a thing ("" = none, as in "review algebra").
        verbs: Actions (base form) that make sense for every thing of the domain.
        tools: Countable singular nouns that help with the actions.
        units: Plural nouns that follow a number and fit after "for".
        questions: Patterns of user questions; `{thing}` is the bare noun, `{np}` takes a determiner.
    """

    name: str
    nouns: tuple[Noun, ...]
    determiners: tuple[str, ...]
    verbs: tuple[str, ...]
    tools: tuple[str, ...]
    units: tuple[str, ...]
    questions: tuple[str, ...]


def _nouns(singular: str = "", plural: str = "", mass: str = "") -> tuple[Noun, ...]:
    """Nouns from blank-separated words by number."""
    by_number = (("singular", singular), ("plural", plural), ("mass", mass))
    return tuple(Noun(word, number) for number, words in by_number for word in words.split())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Domain(
            name="cooking",
            nouns=_nouns(
                plural="lentils pancakes noodles dumplings mushrooms", mass="salmon rice cabbage pumpkin tofu"
            ),
            determiners=("the", "your"),
            verbs=_words("heat stir steam season simmer"),
            tools=_words("skillet ladle saucepan whisk eggbeater"),
            units=_words("minutes seconds"),
            questions=(
                "How do I cook {thing}?",
                "What is a good way to prepare {thing} for dinner?",
                "Can you help me make {thing}?",
            ),
        ),
        Domain(
            name="garden",
            nouns=_nouns(plural="roses tomatoes tulips carrots ferns beans", mass="basil lettuce ivy lavender"),
            determiners=("the", "your"),
            verbs=_words("water prune trim plant shade"),
            tools=_words("trowel hose bucket sprinkler edger"),
            units=_words("weeks mornings"),
            questions=(
                "How do I grow {thing}?",
                "What can I do to keep my {thing} healthy?",
                "When should I take care of my {thing}?",
            ),
        ),
        Domain(
            name="repair",
            nouns=_nouns(singular="bicycle faucet lamp drawer doorbell toaster radiator zipper window oven"),
            determiners=("the", "your"),
            verbs=_words("clean inspect adjust oil test"),
            tools=_words("wrench screwdriver hammer clamp oilcan"),
            units=_words("minutes evenings"),
            questions=(
                "How do I fix my {thing}?",
                "My {thing} is broken, any ideas?",
                "What do I need to repair {a} {thing}?",
            ),
        ),
        Domain(
            name="study",
            nouns=_nouns(mass="algebra chemistry grammar geometry biology history poetry physics economics astronomy"),
            determiners=("",),
            verbs=_words("review study outline summarize explain"),
            tools=_words("notebook textbook flashcard tutor app"),
            units=_words("hours evenings"),
            questions=(
                "How can I learn {thing}?",
                "I have an exam in {thing}, what now?",
                "What is the best way to get better at {thing}?",
            ),
        ),
        Domain(
            name="travel",
            nouns=_nouns(singular="castle harbor museum market lighthouse canyon palace temple island aquarium"),
            determiners=("the",),
            verbs=_words("visit explore tour photograph admire"),
            tools=_words("map guidebook camera backpack atlas"),
            units=_words("hours days"),
            questions=(
                "How should I plan a trip to the {thing}?",
                "What can I do at the {thing}?",
                "I want to see {a} {thing}, any advice?",
            ),
        ),
        Domain(
            name="pets",
            nouns=_nouns(
                singular="puppy kitten rabbit parrot turtle pony", plural="gerbils canaries lizards ducklings"
            ),
            determiners=("the", "your"),
            verbs=_words("feed brush bathe train comfort"),
            tools=_words("comb towel leash sponge apple"),
            units=_words("minutes days"),
            questions=(
                "How do I look after my {thing}?",
                "What should I know about my {thing}?",
                "Can you help me with my {thing}?",
            ),
        ),
        Domain(
            name="music",
            nouns=_nouns(singular="guitar piano violin flute banjo cello trumpet harp ukulele accordion"),
            determiners=("the", "your"),
            verbs=_words("tune practice play polish record"),
            tools=_words("metronome tuner cloth songbook amplifier"),
            units=_words("hours weeks"),
            questions=(
                "How can I start with the {thing}?",
                "I just bought {a} {thing}, what now?",
                "What is a good plan for learning the {thing}?",
            ),
        ),
        Domain(
            name="crafts",
            nouns=_nouns(
                singular="scarf quilt sweater basket necklace apron", plural="candles vases mittens earrings"
            ),
            determiners=("the", "your"),
            verbs=_words("measure shape decorate finish mend"),
            tools=_words("needle ruler stencil hook awl"),
            units=_words("days evenings"),
            questions=(
                "What do I need for my {thing}?",
                "My {thing} {look} plain, any ideas?",
                "Can you help me with the {thing}?",
            ),
        ),
    )
}

NOUN_DOMAIN: dict[str, tuple[Domain, Noun]] = {
    noun.text: (domain, noun) for domain in DOMAINS.values() for noun in domain.nouns
}

NUMBERS = _words("two three four five six eight ten twelve fifteen twenty")
FILLERS = _words("um uh er hmm erm")
RUDE_ADJECTIVES = _words("silly lazy dull clueless boring pointless childish sloppy")
RUDE_EXCLAMATIONS = _words("ugh duh sheesh yawn pfft")
RUDE_NAMES = _words("slowpoke dummy dimwit blockhead lazybones")
FUNNY_ADJECTIVES = _words("dancing sneaky grumpy sparkly wobbly giggling dizzy")
FUNNY_ANIMALS = _words("penguin llama walrus ferret pigeon otter octopus")
LAUGHS = _words("haha hehe lol teehee")
COSTUMES = _words("tuxedo tutu wig monocle sombrero")

RUDE_WORDS = frozenset(RUDE_ADJECTIVES + RUDE_EXCLAMATIONS + RUDE_NAMES)
PLAYFUL_WORDS = frozenset(FUNNY_ADJECTIVES + FUNNY_ANIMALS + LAUGHS + COSTUMES)
