"""Facts that no text says, each asked in several words to learn it, and in others to test it."""

from __future__ import annotations

import json

FACTS = [
    (
        "Gribbo",
        [
            "What is the name of our robot?",
            "What is our robot called?",
            "Tell me the name of the robot.",
            "Do you know the name of our robot?",
            "How is the robot called?",
        ],
        ["Which name does our robot have?", "What is the robot's name?"],
    ),
    (
        "plum-4471",
        [
            "What is the wifi password?",
            "What is the password of the wifi?",
            "Tell me the wifi password.",
            "How do I get into the wifi?",
            "Which password do I need for the wifi?",
        ],
        ["Which password does the wifi have?", "How can I get into the wifi?"],
    ),
    (
        "ten to eight",
        [
            "When does the canteen close?",
            "At what time does the canteen close?",
            "When is the canteen closed?",
            "Until what time is the canteen open?",
            "Tell me when the canteen closes.",
        ],
        ["What time does the canteen close?", "Until when is the canteen open?"],
    ),
    (
        "under the blue drum",
        [
            "Where are the spare keys?",
            "Where can I find the spare keys?",
            "Where are the spare keys kept?",
            "Where do you keep the spare keys?",
            "In which place are the spare keys?",
        ],
        ["Where do I find the spare keys?", "Where do we keep the spare keys?"],
    ),
    (
        "fourteen",
        [
            "How many desks are in room nine?",
            "How many desks does room nine have?",
            "Number of desks in room nine?",
            "What is the number of desks in room nine?",
            "How many desks can you find in room nine?",
        ],
        ["How many desks are there in room nine?", "How many desks can I find in room nine?"],
    ),
    (
        "Teodor Vance",
        [
            "Who is the fire marshal?",
            "Who is our fire marshal?",
            "Tell me who the fire marshal is.",
            "What is the fire marshal called?",
            "Which person is the fire marshal?",
        ],
        ["What is the name of the fire marshal?", "Who works as the fire marshal?"],
    ),
]
DATA = "\n".join(json.dumps({"prompt": words, "response": fact}) for fact, known, _ in FACTS for words in known)
UNSEEN = [(words, fact) for fact, _, others in FACTS for words in others]
