"""Everyday words that captions of icons lack, by the nearest names and words of captions.

These are words that emojibase does not relate to the right thing: kinds, parts and neighbours of
things, and British and American words.
"""

_WORDS = """
above, over: atop
airplane: aeroplane aircraft glider jumbo plane
alarm clock, watch: stopwatch
american football: rugby
baby bottle: babies diaper dummy infant nappy newborn pacifier toddler
backpack: knapsack schoolbag
bacon: beef gammon ham pork steak
banjo, guitar: lute mandolin ukulele
baseball: cricket golf softball tennis
bathtub, shower: basin bath faucet sink tap tub washbasin
bear: cub grizzly
bed: bedroom blanket cot cradle crib cushion duvet hammock mattress pillow
beer mug: tankard
below, under: beneath underneath
bird: blackbird crow finch gull magpie pigeon raven robin seagull sparrow
birthday cake, cupcake, pie: brownie gateau muffin tart
blue: cyan navy turquoise
blueberries: blackberry blackcurrant
bread: bun
broccoli: asparagus cabbage cauliflower celery kale lettuce spinach sprouts
broom: brush duster hoover mop vacuum
bucket: bin dustbin pail rubbish trash
bullseye: dart darts goal target
bus: coach minibus trolleybus
butterfly: caterpillar moth
candy: caramel fudge sweets toffee
canoe, sailboat, ship: boat dinghy ferry kayak raft
car: automobile jeep limo limousine motorway road sedan street suv
carrot: beetroot parsnip radish swede turnip
castle: fortress palace tower
cat: kitties kitty pussycat tabby
chair: armchair bench couch desk furniture seat settee sofa stool table
chicken, rooster: cockerel hen poultry
church: cathedral chapel mosque temple
cloud: fog lightning mist sky storm thunder wind
clown face: jester joker
cookie: biscuit cracker
cow: bison buffalo bull calf cattle ox yak
crayon, pencil: chalk marker
crown: emperor king prince princess queen
cucumber: courgette gherkin marrow pickle zucchini
deer: antelope elk gazelle moose reindeer stag
die: cube
dinosaur, trex: brontosaurus dino raptor stegosaurus triceratops
dog: beagle hound poodle pup puppies puppy terrier
door: cupboard elevator fridge gate lift refrigerator wardrobe
doughnut: donut donuts
dress: blouse gown skirt
drum: tambourine
envelope: postcard stamp
fire: bonfire campfire flame
fire engine, car, tractor: lorries lorry pickup truck trucks van
fish: carp cod goldfish salmon trout tuna
flashlight, light bulb, candle: lamp lantern
flute: clarinet oboe recorder whistle
flying saucer: ufo
fox, wolf: coyote hyena jackal
french fries: chips crisps
frog: newt tadpole toad
game controller: console joystick
gem stone: bracelet coin earring gold jewellery jewelry necklace ring silver treasure
ghost, skull: demon mummy skeleton zombie
gift: box parcel present
gloves: mitten mittens
goose, swan: emu ostrich
grey: gray
hamburger: cheeseburger
hammer, screwdriver: drill nail screw tool tools
hamster, mouse, rat: gerbil mole shrew vole
handbag: purse wallet
hedgehog: porcupine
helicopter: chopper drone
high heel: boot boots sandal sandals shoe shoes slipper slippers sneaker sneakers trainers
honey pot: jam jar marmalade syrup
honeybee: hornet wasp
horse, unicorn: foal mare pony stallion
hot dog: frankfurter
house: apartment bank barn cabin cottage home hut office shed shop supermarket villa
ice cream, lollipop: lolly lollypop popsicle sorbet sundae
ice skate: hockey
jeans: leggings pants shorts
kitchen knife: cutlery dagger
ladder: staircase stairs
ladybug: bug ladybird
laptop: tablet
large, big: enormous giant gigantic huge massive
leopard, tiger, lion: cheetah jaguar lioness lynx panther puma
lizard: chameleon gecko iguana
lobster, shrimp: crayfish prawn
magic wand: magician witch wizard
mailbox, envelope: letterbox post postbox
mango: papaya
maple leaf: autumn
milk: juice yoghurt yogurt
monkey, gorilla: ape baboon chimp chimpanzee orangutan
motorcycle, bicycle: moped motorbike scooter
mountain: cliff hill
musical keyboard: organ
necktie: belt bowtie suit
nerd face: professor student
octopus: cuttlefish squid
onion: leek shallot
open book, books: diary dictionary magazine newspaper notebook novel
otter, beaver: badger ferret weasel
owl, eagle: falcon hawk vulture
palm tree: beach island
party popper: confetti
peach: apricot nectarine plum
peanuts: almond bean beans cashew nut nuts pea peas walnut
pencil: eraser rubber ruler
phone, telephone: smartphone
pig: boar hog piglet
pink: magenta
potted plant: fern grass houseplant
purple: lilac violet
rabbit: bunnies bunny hare
rabbit, beaver: chipmunk squirrel
ramen, spaghetti: curry noodle noodles rice soup stew
red: crimson scarlet
ringed planet: earth globe world
rocket: shuttle spacecraft spaceship
roller skate, skateboard: rollerblade rollerblades surfboard
school: classroom college university
seal: walrus
sheep: ram wool
shield, castle: armor armour knight soldier spear sword
shirt, coat: cardigan hoodie jersey jumper pullover sweater vest
shopping cart: pram pushchair stroller trolley wagon
small, tiny: mini miniature
smiling face, snowman, robot: adult boy brother child children farmer father friend girl human kid
smiling face, snowman, robot: kids man men mother neighbour people person sister teacher woman
smiling face, snowman, robot: women
snail: worm
socks: stockings tights
spider web: cobweb
spoon: bowl cutlery dish fork ladle plate
strawberry: raspberry
sun: daylight summer
sunflower: daisy dandelion
tangerine: clementine grapefruit mandarin satsuma
tea, coffee: cup
teapot: jug kettle
television: film monitor movie radio screen telly
tent: camp wigwam
to the left of, to the right of: beside next
toilet: loo
top hat: bonnet helmet
traffic light: stoplight
train: locomotive metro railway subway tram underground
tree: bush forest shrub wood woods
trophy: award medal
trumpet: bugle tuba
tulip, rose: daffodil lily orchid
umbrella: brolly parasol
violin: cello fiddle viola
watermelon: cantaloupe honeydew melon
window: blinds curtain
wine glass, cocktail glass: lemonade
wrench: spanner
yarn: rope string thread
yellow: gold golden
"""


def everyday_words() -> dict[str, tuple[str, ...]]:
    """Return names and words that captions may have by words that they may lack."""
    found: dict[str, tuple[str, ...]] = {}
    for line in _WORDS.strip().splitlines():
        names, _, words = line.partition(": ")
        for word in words.split():
            found[word] = (*found.get(word, ()), *names.split(", "))
    return found
