"""The attributes of people at work that emoji show."""

from typing import NamedTuple

from jaxdiff.datasets.emoji_names import PROFESSIONS, TONES, WORKER, plain_words, without_tones


class Worker(NamedTuple):
    """A person at work; an emoji without skin tone is yellow, and its `tone` is None."""

    profession: str
    gender: str
    tone: str | None

    @property
    def held_out(self) -> bool:
        """Whether this combination is excluded from training: a sixth of those with a tone.

        The rule is a Latin square over the indices of the words in the tuples above: training
        contains every pair of profession, gender and tone. Men and persons are held out together,
        because their emoji are identical in nine of the professions.
        """
        if self.tone is None:
            return False
        shift = 0 if self.gender == "woman" else 3
        return (PROFESSIONS.index(self.profession) + TONES.index(self.tone) + shift) % 6 == 0


def worker(name: str) -> Worker | None:
    """Return the person at work that an emoji's `name` describes; None without a profession."""
    rest, tones = without_tones(plain_words(name))
    match = WORKER.fullmatch(rest)
    if match is None:
        return None
    return Worker(match[2], match[1] or "person", tones[0] if tones else None)
