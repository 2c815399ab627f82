"""Passages and questions that no template of the training data produced; the answers that count as right."""

READING: list[tuple[str, list[tuple[str, list[str]]]]] = [
    (
        "The library opens at nine and closes at half past six. On Sundays it stays shut.",
        [("When does the library close?", ["half past six"]), ("When does the library open?", ["nine"])],
    ),
    (
        "Our warranty covers every pump for 24 months. Batteries are covered for six months only.",
        [
            ("How long is the warranty for pumps?", ["24 months"]),
            ("How long are batteries covered?", ["six months", "six months only"]),
        ],
    ),
    (
        "Marie Curie was born in Warsaw in 1867 and later moved to Paris, where she discovered radium.",
        [
            ("Where was Marie Curie born?", ["Warsaw"]),
            ("What did Marie Curie discover?", ["radium"]),
            ("When was Marie Curie born?", ["1867", "in 1867"]),
        ],
    ),
    (
        "To reset the router, hold the red button for ten seconds. The default password is maple77.",
        [
            ("What is the default password?", ["maple77"]),
            ("How long should I hold the red button?", ["ten seconds", "for ten seconds"]),
        ],
    ),
    (
        "The Danube flows through ten countries. It is 2850 kilometres long and ends in the Black Sea.",
        [
            ("How long is the Danube?", ["2850 kilometres", "2850 kilometres long"]),
            ("Where does the Danube end?", ["the Black Sea", "in the Black Sea", "Black Sea"]),
        ],
    ),
    (
        "Employees get 28 days of holiday a year. Requests must be sent to Helen Moss before the first of May.",
        [
            ("How many days of holiday do employees get?", ["28", "28 days"]),
            ("Who must requests be sent to?", ["Helen Moss"]),
        ],
    ),
    (
        "My grandmother keeps three cats called Figaro, Minka and Tobias. The oldest one is Minka.",
        [("Who is the oldest cat?", ["Minka"])],
    ),
    (
        "The soup was cooked by Antonio, while Beatrice baked the bread.",
        [("Who baked the bread?", ["Beatrice"]), ("Who cooked the soup?", ["Antonio"])],
    ),
    (
        "Version 3.2 of Kestrel was released on 14 May 2021. It requires Python 3.9.",
        [
            ("When was version 3.2 released?", ["14 May 2021", "on 14 May 2021"]),
            ("What does it require?", ["Python 3.9"]),
        ],
    ),
    (
        "The meeting with the Japanese client has been moved to Thursday at 15:30 in room 204.",
        [("Which room is the meeting in?", ["room 204", "204"])],
    ),
    (
        "Penguins cannot fly, but they swim very well. They eat mostly fish and live in Antarctica.",
        [
            ("Where do penguins live?", ["Antarctica", "in Antarctica"]),
            ("What do penguins eat?", ["fish", "mostly fish"]),
        ],
    ),
    (
        "Albert bought a used bicycle for 120 euros from his neighbour Lucy.",
        [
            ("Who bought a used bicycle?", ["Albert"]),
            ("How much did Albert pay for the bicycle?", ["120 euros"]),
        ],
    ),
    (
        "The capital of Australia is Canberra. The largest city is Sydney.",
        [("What is the capital of Australia?", ["Canberra"])],
    ),
    (
        "The invoice number is 88-1043. Payment is due within thirty days.",
        [("What is the invoice number?", ["88-1043"])],
    ),
    (
        "Clara Novak is the mayor of Brunswick. Her deputy is Paul Stein.",
        [("Who is the mayor of Brunswick?", ["Clara Novak"])],
    ),
]
