"""Captions as people write them, for pictures of one to three drawings."""

import numpy as np
from emoji_data import Emoji


# How else people call what is drawn, where that isn't among the emoji's own names: whole phrases, with their article.
EVERYDAY: dict[str, tuple[str, ...]] = {
    "airplane": ("a plane", "an aeroplane", "a jet"),
    "alarm clock": ("a ringing clock", "a clock"),
    "alien": ("an alien", "a martian"),
    "ambulance": ("an ambulance", "an emergency vehicle"),
    "anchor": ("a ship's anchor",),
    "articulated lorry": ("a big truck", "a lorry"),
    "automobile": ("a car", "somebody's car", "a vehicle"),
    "baby": ("a baby", "a little child"),
    "baby chick": ("a chick", "a small yellow bird"),
    "bacon": ("strips of bacon",),
    "banana": ("a banana", "bananas"),
    "baseball": ("a baseball", "a white ball"),
    "basketball": ("an orange ball", "a basketball"),
    "bathtub": ("a bath", "a tub"),
    "bear": ("a brown bear", "a bear's face"),
    "bed": ("somebody in bed", "a bed"),
    "beer mug": ("a glass of beer", "a beer", "a pint"),
    "bell": ("a golden bell",),
    "bicycle": ("a bike", "a push bike", "something to ride"),
    "bird": ("a bird", "a small bird"),
    "birthday cake": ("a cake", "a cake with candles", "birthday cake"),
    "blue book": ("a book with a blue cover",),
    "bomb": ("a round black bomb",),
    "books": ("a pile of books", "some books"),
    "bouquet": ("a bunch of flowers", "flowers"),
    "boy": ("a boy", "a boy's face"),
    "bread": ("a loaf of bread",),
    "broccoli": ("a piece of broccoli",),
    "bus": ("a bus", "a bus seen from the side"),
    "butterfly": ("a blue butterfly",),
    "cactus": ("a cactus in the desert",),
    "camera": ("a camera for taking pictures",),
    "candle": ("a burning candle",),
    "castle": ("an old castle",),
    "cat": ("a cat", "a whole cat"),
    "cat face": ("a cat", "a kitten", "a cat's face", "a kitty"),
    "chair": ("a chair to sit on",),
    "cheese wedge": ("a piece of cheese", "cheese", "a slice of cheese"),
    "cherries": ("two cherries", "some cherries"),
    "chicken": ("a hen", "a chicken's head"),
    "chocolate bar": ("a bar of chocolate", "chocolate"),
    "Christmas tree": ("a decorated tree", "a tree with lights"),
    "church": ("a church with a cross",),
    "closed book": ("a book", "a shut book"),
    "closed umbrella": ("a folded umbrella",),
    "cloud": ("a white cloud", "clouds"),
    "clown face": ("a clown",),
    "cookie": ("a biscuit", "a cookie with chocolate chips"),
    "couch and lamp": ("a sofa and a lamp", "living room furniture"),
    "cow": ("a cow in a field", "a whole cow"),
    "cow face": ("a cow", "a cow's face"),
    "crescent moon": ("the moon", "a half moon", "a thin moon"),
    "croissant": ("a french pastry", "a croissant"),
    "crown": ("a golden crown", "a crown for a queen"),
    "cupcake": ("a small cake", "a muffin"),
    "deciduous tree": ("a tree", "a green tree"),
    "delivery truck": ("a truck", "a lorry", "a van"),
    "desktop computer": ("a computer", "a computer screen", "a monitor"),
    "dog": ("a dog", "a whole dog", "a dog standing"),
    "dog face": ("a dog", "a puppy", "a dog's face", "somebody's dog"),
    "door": ("a closed door", "a wooden door"),
    "doughnut": ("a donut", "a doughnut with icing"),
    "dress": ("a dress", "a blue dress"),
    "drum": ("a drum with sticks",),
    "duck": ("a duck", "a mallard"),
    "ear": ("somebody's ear",),
    "egg": ("an egg", "a boiled egg"),
    "elephant": ("a grey elephant", "an animal with a trunk"),
    "envelope": ("a letter", "mail"),
    "evergreen tree": ("a fir tree", "a pine", "a tree", "a tree in the woods"),
    "eye": ("somebody's eye",),
    "eyes": ("two eyes", "a pair of eyes"),
    "face with tears of joy": ("a face crying with laughter", "somebody laughing"),
    "fire": ("flames", "a flame", "something burning"),
    "fire engine": ("a fire truck", "a red truck"),
    "fish": ("a fish", "a blue fish"),
    "flashlight": ("a torch", "a flashlight"),
    "fork and knife": ("cutlery", "a knife and a fork"),
    "fox": ("a fox", "a fox's face"),
    "french fries": ("chips", "fries", "a bag of fries"),
    "frog": ("a green frog", "a frog's face"),
    "fuel pump": ("a petrol pump", "a gas station"),
    "full moon": ("the moon", "a round moon"),
    "game die": ("dice", "a die"),
    "gem stone": ("a diamond", "a jewel"),
    "ghost": ("a white ghost",),
    "girl": ("a girl", "a girl's face"),
    "glasses": ("a pair of glasses", "spectacles"),
    "globe showing Europe Africa": ("the earth", "a globe", "the planet earth"),
    "globe showing Americas": ("the earth", "a globe", "our planet"),
    "grapes": ("a bunch of grapes",),
    "green apple": ("an apple", "a green apple"),
    "grinning face": ("a happy face", "a smiley", "somebody smiling"),
    "guitar": ("a guitar", "an instrument with strings", "something to play music on"),
    "hamburger": ("a burger", "a cheeseburger"),
    "hammer": ("a hammer", "a tool for nails"),
    "handbag": ("a bag", "a lady's bag"),
    "headphone": ("headphones", "a pair of headphones"),
    "helicopter": ("a helicopter in the air", "a chopper"),
    "high heeled shoe": ("a lady's shoe", "a red shoe"),
    "honeybee": ("a bee", "a flying insect"),
    "horse": ("a horse running", "a whole horse"),
    "horse face": ("a horse", "a horse's head"),
    "hospital": ("a hospital building",),
    "hot beverage": ("a cup of coffee", "a cup of tea", "coffee", "a hot drink"),
    "hot dog": ("a sausage in a bun", "a hot dog"),
    "house": ("a house", "a home", "a family home", "a little house"),
    "house with garden": ("a house with a tree", "a house and a garden"),
    "ice cream": ("a bowl of ice cream", "ice cream"),
    "jack o lantern": ("a halloween pumpkin", "a carved pumpkin"),
    "jeans": ("trousers", "a pair of jeans", "blue trousers"),
    "key": ("a key", "a key for a door"),
    "kitchen knife": ("a knife", "a sharp knife"),
    "laptop": ("a laptop computer", "a notebook computer"),
    "lemon": ("a yellow lemon", "a sour fruit"),
    "light bulb": ("a lamp", "a lit bulb", "a bulb"),
    "lion": ("a lion", "a lion's face"),
    "locomotive": ("a train", "a steam engine", "an old train"),
    "loudly crying face": ("somebody crying", "a sad face"),
    "maple leaf": ("a red leaf", "an autumn leaf"),
    "mobile phone": ("a phone", "a smartphone", "a cell phone"),
    "money bag": ("a bag of money", "a sack of money"),
    "monkey": ("a monkey sitting", "a whole monkey"),
    "monkey face": ("a monkey", "a monkey's face"),
    "motorcycle": ("a motorbike", "a racing motorbike"),
    "mountain": ("a mountain", "a high mountain"),
    "mouse": ("a mouse", "a small rodent"),
    "mouse face": ("a mouse", "a mouse's face"),
    "musical keyboard": ("a piano", "piano keys"),
    "musical note": ("a note", "music"),
    "mushroom": ("a red mushroom", "a toadstool"),
    "newspaper": ("a paper to read", "the news"),
    "nose": ("somebody's nose",),
    "octopus": ("an octopus", "an animal with eight arms"),
    "office building": ("a tall building", "an office block"),
    "old key": ("an old rusty key", "an antique key"),
    "open book": ("a book", "a book lying open", "somebody's book"),
    "owl": ("an owl", "a night bird"),
    "palm tree": ("a palm", "a tree on a beach"),
    "panda": ("a panda bear", "a black and white bear"),
    "pear": ("a pear", "a green fruit"),
    "pen": ("a ballpoint pen", "a pen to write with"),
    "pencil": ("a yellow pencil", "a pencil to draw with"),
    "penguin": ("a penguin", "a bird from the south pole"),
    "person": ("a person", "somebody"),
    "pig": ("a pig", "a whole pig"),
    "pig face": ("a pig", "a pig's face"),
    "pineapple": ("a pineapple", "a tropical fruit"),
    "pizza": ("a slice of pizza", "a piece of pizza", "some pizza", "pizza with salami"),
    "police car": ("a police car", "a cop car"),
    "popcorn": ("a box of popcorn", "popcorn"),
    "potato": ("a potato",),
    "purse": ("a small bag", "a purse"),
    "rabbit face": ("a bunny", "a rabbit", "a rabbit's face"),
    "rabbit": ("a bunny", "a whole rabbit"),
    "racing car": ("a race car", "a formula one car"),
    "radio": ("an old radio",),
    "rainbow": ("a rainbow in the sky", "a colourful arch"),
    "red apple": ("an apple", "a red apple", "a piece of fruit"),
    "red heart": ("a heart", "love"),
    "ring": ("a diamond ring", "a wedding ring"),
    "robot": ("a robot", "a robot's face"),
    "rocket": ("a rocket", "a space rocket", "a spaceship", "a rocket being launched"),
    "rose": ("a red rose", "a red flower"),
    "running shoe": ("a sneaker", "a sports shoe", "a trainer"),
    "sailboat": ("a boat", "a sailing boat", "a boat with sails", "a yacht"),
    "sandwich": ("a sandwich", "something for lunch"),
    "school": ("a school building",),
    "scissors": ("a pair of scissors",),
    "ship": ("a big ship", "a ship at sea"),
    "shopping cart": ("a trolley", "a supermarket trolley"),
    "shark": ("a shark", "a dangerous fish"),
    "sheaf of rice": ("rice plants",),
    "skull": ("a skull", "a dead man's head"),
    "slightly smiling face": ("a smile", "a smiley"),
    "small airplane": ("a little plane", "a light aircraft"),
    "snail": ("a snail with its shell",),
    "snake": ("a green snake",),
    "snowflake": ("a flake of snow", "snow"),
    "snowman": ("a snowman", "a snowman in the snow", "a figure of snow"),
    "snowman without snow": ("a snowman", "a figure of snow"),
    "soccer ball": ("a ball", "a soccer ball", "a football"),
    "socks": ("a pair of socks",),
    "soft ice cream": ("an ice cream", "an ice cream cone", "ice cream in a cone"),
    "spaghetti": ("a plate of pasta", "pasta", "noodles"),
    "spider": ("a black spider",),
    "spoon": ("a spoon", "a silver spoon"),
    "star": ("a yellow star", "a star"),
    "strawberry": ("a strawberry", "a red berry"),
    "sun": ("the sun", "sunshine"),
    "sun with face": ("the sun", "a smiling sun"),
    "sunflower": ("a sunflower", "a yellow flower", "a flower"),
    "sushi": ("a piece of sushi", "raw fish on rice"),
    "t shirt": ("a shirt", "a t-shirt"),
    "taxi": ("a cab", "a yellow car"),
    "teacup without handle": ("a cup of green tea", "a cup"),
    "teapot": ("a pot of tea", "a teapot"),
    "teddy bear": ("a teddy", "a toy bear", "a soft toy"),
    "telephone": ("an old phone", "a phone"),
    "television": ("a tv", "a tv set", "an old television"),
    "tent": ("a tent for camping",),
    "tiger face": ("a tiger", "a tiger's face"),
    "toilet": ("a toilet", "a loo"),
    "tomato": ("a red tomato", "a tomato"),
    "toothbrush": ("a brush for teeth",),
    "top hat": ("a black hat", "a hat"),
    "tractor": ("a tractor", "a farm vehicle"),
    "train": ("a train", "a train seen from the front"),
    "trophy": ("a golden cup", "a winner's cup"),
    "tropical fish": ("a colourful fish", "a yellow fish"),
    "trumpet": ("a trumpet", "a brass instrument"),
    "tulip": ("a tulip", "a pink flower"),
    "turtle": ("a tortoise", "a turtle"),
    "umbrella": ("an umbrella", "a purple umbrella"),
    "umbrella with rain drops": ("an umbrella in the rain",),
    "violin": ("a violin", "a fiddle"),
    "watch": ("a wristwatch", "somebody's watch"),
    "watermelon": ("a slice of watermelon", "a melon"),
    "whale": ("a whale", "a big blue animal"),
    "wine glass": ("a glass of wine", "red wine"),
    "wolf": ("a wolf", "a wolf's face"),
    "woman": ("a woman", "a lady"),
    "man": ("a man", "somebody with a moustache"),
    "wrapped gift": ("a present", "a gift with a ribbon"),
    "wrench": ("a spanner", "a tool"),
    "zebra": ("a zebra", "a striped horse"),
}
# Without an article, beside what ends like a plural.
UNCOUNTED = {
    *("bacon", "bread", "broccoli", "butter", "cheese", "cooked rice", "curry rice", "garlic", "ginger root", "honey"),
    *("ice cream", "mate", "popcorn", "salt", "shaved ice", "spaghetti", "sushi", "tea"),
    *("camping", "cooking", "fire", "fog", "ice", "soap", "thread", "wood", "yarn"),
}
WHOLE_TEMPLATES = (
    "{}",
    "{}",
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a drawing of {}",
    "an image of {}",
    "this is {}",
    "here is {}",
    "there is {} in the picture",
    "a picture with {} in it",
    "i see {}",
    "look, {}!",
    "a photo of {}.",
)
JOINTS = ("{} and {}", "{} and {}", "{} next to {}", "{} beside {}", "{} with {}", "{} near {}", "{}, {}")
SIDES = ("{} on the left of {}", "{} to the left of {}", "{} left of {}")
OTHER_SIDES = ("{} on the right of {}", "{} to the right of {}", "{} right of {}")
OVER = ("{} above {}", "{} over {}", "{} on top of {}")
UNDER = ("{} below {}", "{} under {}", "{} underneath {}")
# What people add that the pictures don't show, so that the rest of a text counts all the same.
ADJECTIVES = ("cute", "little", "big", "nice", "old", "new", "beautiful", "small", "lovely", "funny", "pretty")
SETTINGS = (
    *("in the sky", "in the garden", "in a field", "in the park", "in the city", "in a room"),
    *("in the snow", "in the sun", "in front of me", "in winter", "in summer"),
    *("in the morning", "at night", "at home", "outside", "on a table", "on the street"),
    *("on the water", "on the floor", "on a shelf", "by the sea"),
    *("for the children", "for you", "that i like"),
)
NUMBERS = {2: ("two", "two", "2", "a pair of", "a couple of"), 3: ("three", "three", "3", "some")}


def article(noun: str) -> str:
    """Return a noun phrase with "a" or "an", or without where it is a plural or can't be counted."""
    last = noun.rsplit(" ", 1)[-1]
    is_plural = last.endswith("s") and not last.endswith(("ss", "us"))
    if noun in UNCOUNTED or is_plural or noun.split(" ", 1)[0] in ("a", "an", "the"):
        return noun
    # The sound counts: a unicorn, an hourglass.
    vowel = noun[0].lower() in "aeiou" and not noun.startswith(("uni", "eu", "one ", "ut", "us"))
    return f"{'an' if vowel or noun.startswith('hour') else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural of a noun that may be several words, of which the last is changed."""
    before, last = noun.rpartition(" ")[0], noun.rpartition(" ")[2]
    irregular = {"man": "men", "woman": "women", "person": "people", "child": "children", "mouse": "mice"}
    irregular |= {"foot": "feet", "tooth": "teeth", "goose": "geese", "fish": "fish", "knife": "knives"}
    irregular |= {"leaf": "leaves", "wolf": "wolves", "loaf": "loaves", "scarf": "scarves", "die": "dice"}
    if last in irregular:
        many = irregular[last]
    elif last.endswith("s") and not last.endswith(("ss", "us")):
        many = last
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        many = f"{last}es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return f"{before} {many}".strip()


class CaptionWriter:
    """Writes captions of pictures whose drawings and places are known.

    Args:
        items: All emoji.
        keywords: For each of them the words by which Unicode's CLDR lets one find it, common ones left out.
        random: What every choice is drawn from.
    """

    def __init__(self, items: list[Emoji], keywords: list[tuple[str, ...]], random: np.random.Generator):
        self.items, self.keywords, self.random = items, keywords, random

    def _pick(self, choices):
        return choices[self.random.integers(len(choices))]

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def name(self, index: int) -> str:
        """Return the name by which an emoji is asked for, or sometimes another of its names."""
        item = self.items[index]
        return self._pick(item.others) if item.others and self._chance(0.25) else item.name

    def noun(self, index: int) -> str:
        """Return what people may call an emoji, without an article: a dog for the dog's face."""
        item = self.items[index]
        name = self.name(index)
        if item.category == "Animals & Nature" and self._chance(0.5):
            name = name.removesuffix(" face")
        return name

    def phrase(self, index: int, colour: str = "") -> str:
        """Return a noun phrase: "a slice of pizza", "a dog", "a red car", "the flag of Japan"."""
        item = self.items[index]
        everyday = EVERYDAY.get(item.name, ())
        if everyday and not colour and self._chance(0.55):
            return self._pick(everyday)
        if item.category == "Flags" and "flag" not in item.name:
            return f"{self._pick(('the flag of', 'flag of', 'the national flag of'))} {item.name}"
        noun = self.noun(index)
        if self.keywords[index] and self._chance(0.15):
            keyword = self._pick(self.keywords[index])
            noun = keyword if self._chance(0.5) else f"{keyword} {noun}" if self._chance(0.5) else f"{noun} {keyword}"
        elif colour and colour not in noun:
            noun = f"{colour} {noun}"
        elif self._chance(0.08):
            noun = f"{self._pick(ADJECTIVES)} {noun}"
        return noun if item.category == "Symbols" else article(noun)

    def several(self, index: int, count: int) -> str:
        """Return a phrase for the same drawing `count` times: "two rockets"."""
        return f"{self._pick(NUMBERS[count])} {plural(self.noun(index))}"

    def whole(self, phrase: str, ground: str = "") -> str:
        """Return a caption made of a phrase, sometimes with what is behind, or with what the picture doesn't show."""
        if ground and self._chance(0.15):
            phrase = f"{phrase} on {ground}"
        elif self._chance(0.08):
            phrase = f"{phrase} {self._pick(SETTINGS)}"
        return self._pick(WHOLE_TEMPLATES).format(phrase)

    def single(self, index: int, colour: str, ground: str) -> str:
        """Return a caption of one drawing, in half of the cases the bare name."""
        return self.name(index) if self._chance(0.5) else self.whole(self.phrase(index, colour), ground)

    def scene(self, indices: list[int], places: list[tuple[float, float]], colours: list[str], ground: str) -> str:
        """Return a caption of two or three different drawings: of all, or of the first alone.

        Args:
            indices: Which emoji, of which the first is what the picture stands for.
            places: Their centres, x to the right and y downwards, in -1..1.
            colours: Of each, or empty.
            ground: What is behind, or empty.
        """
        if self._chance(0.3):
            return self.single(indices[0], colours[0], ground)
        if self._chance(0.15):
            return self._pick((" ", ", ", " and ")).join(self.name(index) for index in indices)
        order = self.random.permutation(len(indices)).tolist()
        parts = [self.phrase(indices[i], colours[i]) for i in order]
        if len(parts) == 3:
            if self._chance(0.8):
                return self.whole(f"{parts[0]}, {parts[1]} and {parts[2]}", ground)
            # Now and then the writer mentions two of three, of which the first drawing is always one.
            first, second = (parts[2], parts[0]) if order[2] == 0 else parts[:2]
            return self.whole(f"{first} and {second}", ground)
        across, down = (places[order[0]][axis] - places[order[1]][axis] for axis in (0, 1))
        joints: tuple[str, ...] = JOINTS
        if self._chance(0.3):
            beside = SIDES if across < 0 else OTHER_SIDES
            joints = beside if abs(across) > abs(down) else OVER if down < 0 else UNDER
        return self.whole(self._pick(joints).format(*parts), ground)


def caption_texts(items: list[Emoji], keywords: list[tuple[str, ...]]) -> list[str]:
    """Return what a vocabulary is learned from: every word that captions may have, names most often."""
    names = [name for item in items for name in (item.name, *item.others)]
    texts = [*names, *(f"a {name}" for name in names), *(f"two {plural(item.name)}" for item in items)]
    texts += [phrase for phrases in EVERYDAY.values() for phrase in phrases for _ in range(3)]
    texts += [word for words in keywords for word in words]
    frames = [*WHOLE_TEMPLATES, *JOINTS, *SIDES, *OTHER_SIDES, *OVER, *UNDER, *ADJECTIVES, *SETTINGS]
    frames += [number for numbers in NUMBERS.values() for number in numbers]
    # As often as it takes for each to become words of the vocabulary.
    return texts + 20 * [frame.replace("{}", "a") for frame in frames]
