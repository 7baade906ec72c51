"""Words that mention the 80 classes of COCO, compiled for accelplug: singular nouns and the plurals that are words of their own."""

COCO_WORDS = {
    # people
    "person": (
        "people, human, individual, pedestrian, bystander, onlooker, spectator, man, men, gentleman, guy, male, woman, women, "
        "lady, female, child, children, kid, toddler, baby, infant, boy, girl, teenager, adult, mother, father, parent, "
        "daughter, bride, groom, crowd, audience, player, athlete, batter, catcher, pitcher, umpire, referee, "
        "skier, snowboarder, skateboarder, skater, surfer, swimmer, runner, cyclist, bicyclist, biker, motorcyclist, rider, "
        "passenger, commuter, driver, pilot, worker, chef, cook, waiter, waitress, customer, vendor, shopper, student, "
        "teacher, doctor, nurse, soldier, policeman, policewoman, police officer, officer, firefighter, farmer, cowboy"
    ),
    # vehicles
    "bicycle": "bike, tricycle, tandem",
    "car": "automobile, taxi, taxicab, cab, sedan, suv, van, minivan, hatchback, convertible, limousine, limo, jeep, police car",
    "motorcycle": "motorbike, motor bike, motor cycle, moped, scooter, motor scooter, dirt bike, vespa",
    "airplane": "plane, aeroplane, air plane, aircraft, jet, airliner, jetliner, biplane, seaplane, jumbo jet, fighter jet",
    "bus": "minibus, double decker, school bus, tour bus, trolleybus",
    "train": "locomotive, tram, streetcar, subway train, railcar, train car, steam engine",
    "truck": "pickup, pickup truck, lorry, fire truck, firetruck, fire engine, semi truck, dump truck, tow truck",
    "boat": "ship, sailboat, sail boat, motorboat, speedboat, rowboat, canoe, kayak, yacht, ferry, raft, gondola, dinghy, barge",
    # street
    "traffic light": "traffic signal, stoplight, stop light, streetlight, street light",
    "fire hydrant": "hydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "park bench",
    # animals
    "bird": (
        "duck, goose, geese, swan, gull, seagull, pigeon, dove, crow, raven, parrot, parakeet, owl, eagle, hawk, falcon, sparrow, "
        "robin, finch, hummingbird, pelican, heron, egret, stork, flamingo, ostrich, peacock, hen, rooster, "
        "penguin, woodpecker"
    ),
    "cat": "kitten, kitty, tabby, feline",
    "dog": "puppy, pup, hound, canine, terrier, poodle, bulldog, labrador, retriever, dachshund, beagle, sheepdog, husky, corgi, pug",
    "horse": "pony, foal, colt, mare, stallion",
    "sheep": "lamb, ewe, ram, goat",
    "cow": "cattle, calf, calves, bull, ox, oxen, steer, heifer, bison, buffalo",
    "elephant": "",
    "bear": "polar bear, grizzly, panda, bear cub",
    "zebra": "",
    "giraffe": "",
    # carried
    "backpack": "rucksack, knapsack, back pack",
    "umbrella": "parasol",
    "handbag": "purse, hand bag, tote bag, shoulder bag",
    "tie": "necktie, neck tie, bowtie, bow tie",
    "suitcase": "suit case, luggage, briefcase",
    # sports
    "frisbee": "flying disc",
    "skis": "ski",
    "snowboard": "snow board",
    "sports ball": "ball, tennis ball, soccer ball, soccerball",
    "kite": "",
    "baseball bat": "bat",
    "baseball glove": "baseball mitt, mitt",
    "skateboard": "skate board, longboard",
    "surfboard": "surf board, paddleboard, paddle board, bodyboard, boogie board",
    "tennis racket": "racket, racquet, tennis racquet",
    # tableware
    "bottle": "wine bottle, beer bottle, water bottle",
    "wine glass": "wineglass, goblet, champagne glass",
    "cup": "mug, teacup, tea cup, coffee cup",
    "fork": "",
    "knife": "knives, butter knife, pocket knife",
    "spoon": "teaspoon, tablespoon",
    "bowl": "",
    # food
    "banana": "",
    "apple": "",
    "sandwich": "burger, hamburger, cheeseburger, panini",
    "orange": "tangerine, clementine, mandarin",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog, frankfurter",
    "pizza": "",
    "donut": "doughnut",
    "cake": "cupcake, cheesecake, birthday cake, wedding cake",
    # furniture
    "chair": "armchair, stool, seat, rocking chair, high chair, highchair",
    "couch": "sofa, loveseat, love seat, settee, futon",
    "potted plant": "houseplant, house plant, pot plant",
    "bed": "bunk bed, mattress",
    "dining table": "table, desk, coffee table, kitchen table, picnic table",
    "toilet": "urinal, commode, toilet bowl",
    # electronics
    "tv": "television, tv set, television set, tv screen, monitor, television screen, computer monitor, computer screen",
    "laptop": "laptop computer, notebook computer, macbook",
    "mouse": "computer mouse, mice",
    "remote": "remote control, remote controller, game controller, wii remote, wii controller",
    "keyboard": "computer keyboard",
    "cell phone": "phone, cellphone, mobile phone, cellular phone, telephone, smartphone, smart phone, iphone",
    # kitchen
    "microwave": "microwave oven",
    "oven": "stove, stovetop, stove top, cooker",
    "toaster": "toaster oven",
    "sink": "washbasin, wash basin",
    "refrigerator": "fridge, freezer",
    # indoor
    "book": "textbook, paperback",
    "clock": "clock tower, alarm clock",
    "vase": "",
    "scissors": "shears",
    "teddy bear": "teddy, stuffed bear, teddybear",
    "hair drier": "hair dryer, hairdryer, blow dryer",
    "toothbrush": "tooth brush",
}
"""Class -> its other words, separated by commas; the class itself is one. Classes are in COCO's order."""
