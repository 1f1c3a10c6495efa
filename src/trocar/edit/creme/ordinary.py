"""Ordinary prompts of the form of the cases: what an edit is most likely to disturb, and so what its least change is best measured on.

An edit acts at a prompt's last token. The keys there are alike in all prompts of one form ("The capital of ... is") and unlike those of
running text, so that a second moment of text protects them less than one of such prompts does.
"""

from __future__ import annotations

from collections.abc import Sequence

from trocar.edit.creme.case import HOLE, Case

# of many kinds, named and unnamed, plain and by description; none of them is the subject of a case of the two-hop set
SUBJECTS = (
    *("Canada", "Norway", "Kenya", "Peru", "Vietnam", "Oslo", "Lima", "Nairobi", "my friend", "the teacher", "this book", "the river"),
    *("the man who won the race", "the woman who wrote the letter", "the author of the novel", "the director of the film"),
    *("the city where she lives", "the town by the sea", "the country next to Canada", "the country where coffee is grown"),
    *("the country where the treaty was signed", "the country where kangaroos live", "the land where the river ends"),
    *("the country where his mother was born", "the country where the factory was built", "the place where they met"),
    *("a large company", "the company that makes the phone", "the company that built the bridge", "the team that won the cup"),
)
TEMPLATES = (
    *("The capital of {} is", "The official language of {} is", "The currency of {} is the", "The president of {} is"),
    *("The largest city of {} is", "The national dish of {} is", "The most famous person from {} is", "The flag of {} is"),
    *("The population of {} is", "The name of {} is", "The color of {} is", "The continent of {} is"),
)


def ordinary_prompts(cases: Sequence[Case], subjects: Sequence[str] = SUBJECTS, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The cases' templates and `templates` with each of `subjects`: English prompts that ask something else than any case does.

    Prompts that a case or one of its queries asks are left out, so that nothing measured on them was protected by name.
    """
    forms = dict.fromkeys([*(case.template for case in cases), *templates])
    asked = {text for case in cases for text in (case.prompt, case.guide, case.first_hop)}
    asked |= {query.prompt for case in cases for query in (*case.paraphrases, *case.generalisation, *case.unrelated)}
    prompts = [form.replace(HOLE, subject) for form in forms for subject in subjects]
    return [prompt for prompt in dict.fromkeys(prompts) if prompt not in asked]
