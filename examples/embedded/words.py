"""The vocabulary of the small world: facts, feelings, traits, wishes and the phrases that speak of them.

A word of ``FACTS`` occurs nowhere but where the fact is meant, so whatever a text says about a user can be read off it.
"""

from __future__ import annotations


def _phrases(text: str) -> list[str]:
    """Phrases separated by bars, on as many lines as they need."""
    return [" ".join(phrase.split()) for phrase in text.split("|")]


FACTS: dict[str, list[str]] = {
    "job": """nurse teacher baker plumber lawyer pilot chef farmer barber tailor driver carpenter dentist journalist
        librarian mechanic waiter cashier accountant architect electrician florist engineer translator paramedic
        firefighter receptionist programmer pharmacist butcher biologist welder surveyor locksmith optician""".split(),
    "person": """sister brother mother father grandmother grandfather aunt uncle cousin niece nephew husband wife
        daughter son roommate neighbour boss colleague coach landlord girlfriend boyfriend stepfather stepmother
        godmother twin mentor""".split(),
    "hobby": """chess pottery climbing knitting painting swimming running cycling hiking surfing dancing singing
        gardening baking fishing sailing skating yoga karate tennis badminton basketball football archery photography
        origami calligraphy astronomy birdwatching woodcarving embroidery juggling rowing fencing drumming""".split(),
    "pet": """dog cat rabbit parrot hamster horse goat tortoise ferret canary goldfish lizard snake hedgehog donkey
        duck pony mouse gecko spider budgie""".split(),
    "place": """Lisbon Oslo Turin Dublin Prague Vienna Boston Denver Kyoto Lima Cairo Athens Bergen Geneva Havana
        Helsinki Krakow Leeds Lyon Madrid Malmo Milan Nairobi Naples Osaka Porto Quito Riga Seville Tallinn Toronto
        Tunis Utrecht Warsaw Zurich""".split(),
    "event": """exam interview wedding audition operation trial presentation concert marathon funeral graduation
        hearing competition inspection performance reunion deadline appraisal appointment ceremony tournament viewing
        recital election exhibition launch debate flight""".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
}

# What a seeker says to reveal a fact; the day comes with the event.
REVEALS: dict[str, list[str]] = {
    "job": _phrases("""I work as {a} {v}. | I am {a} {v} by trade. | I have been {a} {v} for ten years. | Being {a}
        {v} takes all my energy. | You should know that I am {a} {v}. | As {a} {v} I hardly get a break. | I found a
        job as {a} {v} last spring. | They hired me as {a} {v}."""),
    "person": _phrases("""My {v} is the only one I talk to. | I live with my {v}. | I told my {v} about it. | My {v}
        keeps asking what is wrong. | I am very close to my {v}. | Even my {v} has noticed. | My {v} means a lot to
        me. | I do not want to trouble my {v}."""),
    "hobby": _phrases("""I used to love {v}. | Normally {v} calms me down. | I have given up {v} lately. | The only
        thing I still enjoy is {v}. | There was a time when I did {v} every week. | I have no energy for {v} any more.
        | What I miss most is {v}. | Without {v} the evenings are long."""),
    "pet": _phrases("""I have {a} {v} at home. | At least my {v} keeps me company. | I still have to look after my
        {v}. | My {v} sleeps next to me. | Only my {v} makes me smile. | My {v} seems to sense it. | I talk to my {v}
        at night. | Then I sit with my {v} for hours."""),
    "place": _phrases("""I live in {v}. | I moved to {v} last year. | Here in {v} I hardly know anyone. | I am from
        {v}, by the way. | It is not easy to live in {v}. | Life in {v} is so loud. | We came to {v} for my work. | I
        would like to leave {v}."""),
    "event": _phrases("""On top of that there is my {v} on {d}. | I have my {v} coming up on {d}. | My {v} is on {d}.
        | I cannot stop thinking about the {v} on {d}. | On {d} I have my {v}. | They want me ready for the {v} on
        {d}. | There is {a} {v} on {d}. | I dread {d}, because of the {v}."""),
}

# How a reply takes a fact up: a remark, and a question or a small step.
REMARKS: dict[str, list[str]] = {
    "job": _phrases("""Being {a} {v} asks a lot of you. | {A} {v} carries so much every day. | Your work as {a} {v}
        sounds tiring. | Not everyone could be {a} {v}."""),
    "person": _phrases("""It is good that your {v} is there. | Your {v} clearly matters to you. | I hear how much your
        {v} counts for you. | You and your {v} share a lot."""),
    "hobby": _phrases("""You found calm in {v} before. | It hurts to lose the joy of {v}. | I hear how much you love
        {v}. | It was {v} that gave you strength."""),
    "pet": _phrases("""Your {v} gives you real comfort. | {A} {v} can be such good company. | How lovely that you have
        {a} {v}. | Your {v} needs you too."""),
    "place": _phrases("""Life in {v} can be lonely. | It takes courage to live in {v}. | You have come a long way to
        {v}. | Being in {v} does not make it easier."""),
    "event": _phrases("""No wonder the {v} is on your mind. | The {v} puts you under pressure. | So much hangs on the
        {v}. | You worry about the {v}."""),
}
STEPS: dict[str, list[str]] = {
    "job": _phrases("""Could you take a short break from being {a} {v}? | Do you know another {v} who understands? |
        What do you like about being {a} {v}?"""),
    "person": _phrases("""Could you talk to your {v} tonight? | What would your {v} say to this? | Maybe tell your {v}
        how you feel."""),
    "hobby": _phrases("""Maybe a little {v} would help you. | How about some {v} this week? | When did you last enjoy
        {v}?"""),
    "pet": _phrases("""Take a quiet hour with your {v}. | What does your {v} do then? | Let your {v} cheer you up a
        bit."""),
    "place": _phrases("""Is there a quiet spot in {v}? | Who could you meet in {v}? | What do you like about {v}?"""),
    "event": _phrases("""Let us prepare for the {v} in small steps. | What would help before the {v}? | How will you
        rest before the {v}?"""),
}
WITH_FEELING = _phrases("""You feel {f}, and that makes sense. | Feeling {f} is hard. | I hear that you feel {f}. | No
    wonder you feel {f}. | It is all right to feel {f}.""")

EMOTIONS: dict[str, list[str]] = {
    "anxiety": "anxious worried nervous".split(),
    "sadness": "sad down tearful".split(),
    "anger": "angry furious bitter".split(),
    "shame": "ashamed embarrassed humiliated".split(),
    "guilt": "guilty remorseful sorry".split(),
    "fear": "scared afraid frightened".split(),
    "loneliness": "lonely isolated abandoned".split(),
    "frustration": "frustrated stuck annoyed".split(),
    "exhaustion": "exhausted drained weary".split(),
    "jealousy": "jealous envious possessive".split(),
    "despair": "hopeless desperate defeated".split(),
    "confusion": "confused lost torn".split(),
    "disappointment": "disappointed betrayed cheated".split(),
    "stress": "overwhelmed stressed tense".split(),
}
FEELINGS = _phrases("""I feel so {f} these days. | Lately I feel {f}. | I have been feeling {f} for weeks. | To be
    honest, I am {f}. | I wake up {f} every morning. | All of this makes me {f}.""")

TRAITS: dict[str, list[str]] = {
    "shy": ["I find it hard to speak in front of people.", "I blush as soon as someone looks at me."],
    "perfectionist": ["Everything I do has to be flawless.", "I check my work five times."],
    "organised": ["I write a list for everything.", "I plan every hour of my week."],
    "impulsive": ["I always act before I think.", "I decide things in a second and regret them."],
    "caring": ["I always put the others first.", "I cannot bear it when somebody suffers."],
    "stubborn": ["I never change my mind.", "I hate to give in."],
    "independent": ["I never ask anyone for help.", "I like to solve things on my own."],
    "sensitive": ["Small remarks hurt me for days.", "I cry easily."],
    "curious": ["I want to know how everything works.", "I ask a thousand questions."],
    "ambitious": ["I always want to be the best.", "I set my goals very high."],
    "cautious": ["I avoid every risk.", "I think twice before each step."],
    "cheerful": ["Usually I joke about everything.", "Normally I am the one who laughs."],
}
WISHES: dict[str, list[str]] = {
    "wants to be heard": ["I just need someone to listen.", "It helps to say it out loud."],
    "wants advice": ["What would you do?", "I could use some advice."],
    "wants reassurance": ["Will it ever get better?", "Am I overreacting?"],
    "wants courage": ["I need a push to go on.", "I do not dare to start."],
    "wants a plan": ["I need to know what to do first.", "How do I begin?"],
    "wants distraction": ["I would rather think of something else.", "I want to forget it for a while."],
}
UNKNOWN = "not clear yet"

PROBLEMS: dict[str, list[str]] = {
    "breakup with partner": ["My partner left me.", "We broke up after years.", "I was left by text message."],
    "job crisis": ["I may lose my job.", "My hours were cut again.", "I was passed over again."],
    "problems with friends": ["My friends stopped calling.", "A friend told my secret.", "My friends left me out."],
    "academic pressure": ["My grades are getting worse.", "I failed a course.", "I cannot keep up with my studies."],
    "sleep problems": ["I hardly sleep any more.", "I lie awake until three.", "The nights are the worst."],
    "conflict at home": ["We argue at home every day.", "Nobody speaks to me at home.", "At home they shout at me."],
    "money worries": ["I cannot pay the rent.", "My savings are gone.", "The bills keep piling up."],
    "health worries": ["I have been ill for months.", "The doctors find nothing.", "My back hurts all the time."],
}
HELLOS = ["Hello.", "Hi.", "Hi there.", "Good evening.", "Hello, are you there?", "Hey, do you have a minute?"]
WELCOMES = ["Hello! How are you today?", "Hi, I am here for you.", "Hello, what brings you here?", "Hi! Tell me more."]
FILLERS = _phrases("""It has been like this for weeks. | I do not know what to do. | It never stops. | Nobody
    understands it. | I keep thinking about it. | It is all too much. | I cannot go on like this. | I wish it were
    over. | You are right. | I guess so. | Yes, exactly. | Maybe. | I will think about that. | That is kind of
    you.""")
BYES = ["Thank you, that helped. Bye.", "Thanks for listening. Goodbye.", "I feel a bit better now. Thank you.",
        "I have to go now. Thanks a lot.", "Thank you so much. Good night."]  # fmt: skip
FAREWELLS = ["Take care of yourself. Goodbye.", "You are welcome. All the best.", "I am glad. Come back any time.",
             "Thank you for your trust. Bye.", "Good luck, and take care."]  # fmt: skip

# Short replies that would fit anybody, as in the human dialogues, by strategy.
SHORT: dict[str, list[str]] = {
    "Question": _phrases("""Can you tell me more about it? | How long has this been going on? | What bothers you most?
        | How did that start? | What happened then? | Is there someone you can talk to?"""),
    "Reflection of feelings": _phrases("""That sounds really hard. | I can hear how heavy this is. | It must be
        painful. | That would upset anyone. | This is a lot to carry."""),
    "Restatement or Paraphrasing": _phrases("""So things have not been easy. | So it keeps coming back. | You are
        going through a lot. | It sounds like you need a break."""),
    "Affirmation and Reassurance": _phrases("""You are stronger than you think. | You are doing your best. | It is
        good that you talk about it. | I am sure it will get better. | You are not alone with this."""),
    "Providing Suggestions": _phrases("""Maybe go for a walk. | Try to rest a little. | Perhaps write it down. | Take
        one step at a time. | Maybe try some deep breaths."""),
    "Self-disclosure": _phrases("""I know that feeling too. | I have been there myself. | Something like that happened
        to me."""),
    "Information": _phrases("""Many people go through this. | Sleep makes a big difference. | Talking often helps."""),
    "Others": _phrases("""I see. | Thank you for telling me. | I am here for you. | Of course. | Take your time."""),
}
PERSONAL_STRATEGIES = ["Reflection of feelings", "Affirmation and Reassurance", "Providing Suggestions", "Question"]

# What the synthetic dialogues, in ExTES's schema, call the strategies.
EXTES_NAMES = {
    "Question": "Clarification",
    "Reflection of feelings": "Reflective Statements",
    "Restatement or Paraphrasing": "Reflective Statements",
    "Affirmation and Reassurance": "Affirmation",
    "Providing Suggestions": "Suggest Options",
    "Self-disclosure": "Normalize Experiences",
    "Information": "Share Information",
    "Others": "Others",
}

# The long and general phrases of an assistant that was not made for this: an opening and an advice.
LONG_OPENINGS = _phrases("""I am really sorry to hear that you are going through such a difficult time. | I completely
    understand how challenging this situation must be for you right now. | Thank you for sharing this with me, it
    takes a lot of strength to open up. | It is perfectly normal to experience feelings like these in difficult
    situations. | Please remember that your feelings are valid and that you deserve support. | What you are describing
    is something that many people experience at some point. | It sounds like you are dealing with a lot of difficult
    emotions at the moment. | I want you to know that you are not alone in this difficult situation.""")
LONG_ADVICE = _phrases("""It may be helpful to reach out to a professional who can offer guidance and support. |
    Remember to be kind to yourself and to take things one step at a time. | Consider practising self-care, such as
    breathing exercises, regular sleep and a balanced diet. | It is important to give yourself time and to focus on
    what you can control. | Have you considered keeping a journal in order to express your thoughts and emotions? | It
    can be useful to talk openly with people you trust about what you are experiencing. | With patience and the right
    support, things can improve over time. | Try to identify the main causes of these feelings and to address them
    step by step.""")
