"""How the demo's users ask: question templates by what is asked and of which kind of object.

Fields: {name} full dotted name, {short} last part, {owner} enclosing class or module, {module},
{kind}, {summary} first sentence of the documentation.
"""

SYSTEM_PROMPTS = (
    "You answer questions about Python's standard library from its documentation.",
    "You are a Python reference. Quote the documentation; do not add opinions.",
    "You help Python programmers find their way in the standard library. Be brief and exact.",
)

# What the object does; the answer is its documentation.
WHAT = (
    "What does `{name}` do?",
    "What does the {kind} `{name}` do?",
    "Explain `{name}` in Python.",
    "What is `{name}` for?",
    "Show me the documentation of `{name}`.",
    "Please describe `{name}`.",
    "I found `{name}` in some code. What does it do?",
    "Can you tell me about the {kind} `{short}` of `{owner}`?",
)
# How it is used; the answer begins with the signature.
USAGE = (
    "How do I call `{name}`?",
    "How is `{name}` used?",
    "Signature and description of `{name}`, please.",
    "How do I use the {kind} `{short}` from `{owner}`?",
    "Give me the signature of `{name}` and what it does.",
    "I want to use `{name}`. How does it work?",
)
# Where it belongs; the answer names class and module first.
WHERE = (
    "What is `{short}` in `{owner}`?",
    "What is `{name}`, and where does it belong?",
    "Where do I find `{short}`, and what does it do? I think it is in `{owner}`.",
    "Is there something called `{short}` in `{owner}`?",
)
PARAMETERS = (
    "Which parameters does `{name}` take?",
    "What are the arguments of `{name}`?",
    "What can I pass to `{name}`?",
    "List the parameters of `{name}` with their defaults.",
)
# The other way round: from the description to the name.
LOOKUP = (
    'Which {kind} of `{owner}` has this description: "{summary}"?',
    'I am looking for something in `{module}`: "{summary}" What is it called?',
    'What in `{owner}` does the following? "{summary}"',
)
THEN_WHAT = (
    "And what does it do?",
    "Thanks. What does it do exactly?",
    "What is it for?",
    "Good. Now describe it, please.",
)
THEN_PARAMETERS = (
    "Which parameters does it take?",
    "And what are its arguments?",
    "What can I pass to it?",
)
THEN_MEMBERS = (
    "Which methods does it have?",
    "What can I do with an instance of it?",
    "And its most important members?",
)
MEMBERS = (
    "Which methods does the class `{name}` have?",
    "List the members of `{name}`.",
    "What can I do with `{name}` objects?",
    "Give me an overview of the class `{name}`.",
)
MODULE = (
    "What is the module `{name}` for?",
    "Give me a summary of the module `{name}`.",
    "What is in the module `{name}`?",
    "Tell me about Python's `{name}` module.",
)
CONTENTS = (
    "Which functions and classes does `{name}` offer?",
    "What are the main names in `{name}`?",
    "List the contents of the module `{name}`.",
)
TOPIC = (
    'What does the Python language reference say about "{name}"?',
    'Explain the topic "{name}" of the Python language.',
    'Show me the help text on "{name}".',
)
