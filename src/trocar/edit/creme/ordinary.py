"""Ordinary prompts of the form of the cases: what an edit is most likely to disturb, and so what its least change is best measured on.

An edit acts at a prompt's last token. The keys there are alike in all prompts of one form ("The capital of ... is") and unlike those of
running text, so that a second moment of text protects them less than one of such prompts does. Nothing here is labelled, and nothing named
here is asked about in the two-hop set of the package.
"""

from __future__ import annotations

from collections.abc import Sequence

from trocar.edit.creme.case import HOLE, Case


def _names(text: str) -> list[str]:
    return text.split("|")


COUNTRIES = _names(
    "Ukraine|Serbia|Croatia|Bulgaria|Slovakia|Slovenia|Lithuania|Latvia|Estonia|Algeria|Tunisia|Libya|Iraq|Syria|Lebanon|Jordan|"
    "Afghanistan|Nepal|Sri Lanka|Cambodia|Mongolia|Kazakhstan|Georgia|Armenia|Ghana|Senegal|Uganda|Tanzania|Zambia|Zimbabwe|Angola|"
    "Mozambique|Madagascar|Venezuela|Ecuador|Bolivia|Uruguay|Panama|Costa Rica|Guatemala|Haiti|Scotland|Wales|Luxembourg|Malta|"
    "Singapore|Taiwan|Qatar|Kuwait|Sudan"
)
PLACES = _names(
    "Odessa|Novi Sad|Dubrovnik|Plovdiv|Kosice|Lake Bled|Kaunas|Daugavpils|Tartu|Oran|Carthage|Benghazi|Basra|Aleppo|Baalbek|Petra|Kandahar|"
    "Mount Everest|Kandy|Angkor Wat|the Gobi Desert|Almaty|Batumi|Mount Aragats|Kumasi|Dakar|Entebbe|Mount Kilimanjaro|Victoria Falls|"
    "Bulawayo|Luanda|Maputo|Antananarivo|Caracas|the Galapagos|La Paz|Montevideo|the Panama Canal|San Jose|Tikal|Port-au-Prince|"
    "Edinburgh Castle|Cardiff|the Duchy of Vianden|Valletta|Marina Bay|Taipei 101|Doha|the Kuwait Towers|Khartoum"
)
PEOPLE = _names(
    "Novak Djokovic|Nikola Tesla|Mother Teresa|Luka Modric|Hristo Stoichkov|Didier Drogba|George Weah|Samuel Eto'o|Mohamed Salah|"
    "Andriy Shevchenko|Simon Bolivar|Hugo Chavez|Luis Suarez|Manuel Noriega|Saddam Hussein|Muammar Gaddafi|Freddie Mercury|Robert Mugabe|"
    "Lee Kuan Yew|Jackie Chan|Sean Connery|Adam Smith|Tom Jones|Dylan Thomas|Omar Sharif|Khalil Gibran|Genghis Khan|Joseph Stalin|"
    "Garry Kasparov|Rihanna"
)
WORKS = _names(
    "the author of 1984|the author of Frankenstein|the author of Dracula|the author of Treasure Island|the author of Moby Dick|"
    "the author of The Hobbit|the author of Ulysses|the author of Faust|the author of The Metamorphosis|the author of Lolita|"
    "the author of The Stranger|the painter of Girl with a Pearl Earring|the painter of The Birth of Venus|the painter of The Kiss|"
    "the painter of American Gothic|the painter of Las Meninas|the composer of Messiah|the composer of Bolero|the composer of Parsifal|"
    "the composer of Rhapsody in Blue|the composer of The Barber of Seville|the director of Psycho|the director of Jaws|"
    "the director of Titanic|the inventor of the telephone|the inventor of dynamite|the discoverer of penicillin|"
    "the founder of psychoanalysis"
)
CITIES = _names(
    "Seattle|Belgrade|Damascus|Baghdad|Zagreb|the city where the Burj Khalifa stands|the city where the Space Needle stands|"
    "the city where the Golden Gate Bridge stands|the city where Edinburgh Castle stands|the city where the Western Wall stands|"
    "the city where the White House stands|the city where the Atomium stands|the city where the Hofburg stands|"
    "the city where Table Mountain lies|the city where Wawel Castle stands|the city where La Scala stands|the city where the Alamo stands"
)
COMPANIES = _names(
    "Boeing|Intel|Pepsi|Google|the company that makes the iPhone|the company that makes Windows|the company that makes the Mustang|"
    "the company that makes Coca-Cola|the company that runs YouTube|the company that makes the Kindle|the company that makes the Model S|"
    "the company that makes the Airbus A380|the company that makes the Big Mac|the company that makes ThinkPad laptops"
)
COMMON = _names(
    "the city|the book|my friend|a large company|the river|the woman who wrote the letter|the man who won|the team that won the cup|"
    "the land where coffee grows|the country next to ours|the village|the museum|the king|the football club"
)
OF_COUNTRIES = (
    *("The official language of {} is", "The main language of {} is", "The language spoken in {} is", "The capital of {} is"),
    *("The capital city of {} is", "The currency of {} is the", "The continent of {} is", "The largest city of {} is"),
    *("The flag of {} is", "The president of {} is", "The population of {} is", "The national dish of {} is"),
)
OF_CITIES = ("The country in which {} lies is", "The river that flows through {} is the", "The population of {} is", "The mayor of {} is")
OF_PEOPLE = (
    "The native language of {} was",
    "The country where {} was born is",
    "The mother tongue of {} was",
    "The birth country of {} is",
)
OF_COMPANIES = ("The home country of {} is", "The country where {} was founded is", "The founder of {} is")

# (subjects, templates, how many of them each subject is asked about)
GROUPS: tuple[tuple[Sequence[str], Sequence[str], int], ...] = (
    (COUNTRIES, OF_COUNTRIES, 4),
    ([f"the country where {place} lies" for place in PLACES], OF_COUNTRIES, 4),
    ([f"the country in which {place} is located" for place in PLACES[:25]], OF_COUNTRIES, 4),
    ([f"the country where {name} was born" for name in PEOPLE], OF_COUNTRIES, 4),
    ([f"the birth country of {name}" for name in PEOPLE[:15]], OF_COUNTRIES, 4),
    (CITIES, OF_CITIES, 2),
    ([*WORKS, *PEOPLE], OF_PEOPLE, 2),
    (COMPANIES, OF_COMPANIES, 2),
    (COMMON, OF_COUNTRIES, 2),
)


def ordinary_prompts(cases: Sequence[Case] = ()) -> list[str]:
    """About 850 English prompts of the two-hop set's form, and further templates of `cases` with common subjects.

    Prompts that a case or one of its queries asks are left out, so that nothing measured on them was protected by name.
    """
    prompts = [
        templates[(number * count + step) % len(templates)].replace(HOLE, subject)
        for subjects, templates, count in GROUPS
        for number, subject in enumerate(subjects)
        for step in range(count)
    ]
    known = {*OF_COUNTRIES, *OF_CITIES, *OF_PEOPLE, *OF_COMPANIES}
    more = [template for template in dict.fromkeys(case.template for case in cases) if template not in known]
    prompts += [template.replace(HOLE, subject) for template in more for subject in COMMON]
    asked = {text for case in cases for text in (case.prompt, case.guide, case.first_hop)}
    asked |= {query.prompt for case in cases for query in (*case.paraphrases, *case.generalisation, *case.unrelated)}
    return [prompt for prompt in dict.fromkeys(prompts) if prompt not in asked]
