#include "text/selftest_text.h"

namespace nb::text {

std::string_view selftest_text() {
  return R"(The weather station at Holm Point stands on a shelf of rock above the lake, two hours on foot from the
nearest road. Four people live there through the winter: Ines Okafor, who keeps the instruments; Bertil
Strand, who keeps the generator; Tomas Reyes, who cooks; and Yuki Arden, who is there to study lichen and is asked about everything else.

Every morning at seven Ines reads the mercury barometer in the hall, although three electronic ones report to the
mainland by themselves. "The electronic ones tell you the pressure," she says. "This one tells you whether they are
lying." On the ninth of January it showed 962 hectopascals, the lowest value since the station was built, and by
noon the anemometer on the mast had stopped turning because it was covered with ice.

Bertil went out with a rope around his waist and a wooden mallet. He was gone for twenty minutes. When he came back
his beard was white and he had lost the mallet, but the anemometer was turning again. Tomas gave him soup. Yuki
wrote the time into the log, because somebody had to.

The stores that were left in that week, as Tomas counted them:

| item         | boxes | per box | total |
|--------------|------:|--------:|------:|
| lentils      |     6 |      12 |    72 |
| rice         |     4 |      10 |    40 |
| dried apples |     3 |      25 |    75 |
| candles      |     9 |      20 |   180 |
| matches      |     2 |      50 |   100 |

Ines keeps the readings in a small program. It has a function that finds the largest fall of pressure between two
readings, and it looks like this:

def largest_fall(readings):
    highest = readings[0]
    largest = 0.0
    for pressure in readings[1:]:
        largest = max(largest, highest - pressure)
        highest = max(highest, pressure)
    return largest

For the readings 1001, 998, 985, 990 and 962 it returns 39, since the highest reading was 1001 and the lowest one
after it was 962. For readings that only rise it returns 0.

In the evening they play cards or ask each other questions. Who lost the mallet? Bertil lost the mallet. Who gave
him soup? Tomas gave him soup. How many candles are there in nine boxes of twenty? There are 180 candles. Which
barometer does Ines trust? The mercury barometer in the hall, because it tells her whether the electronic ones are
lying. What does Yuki Arden study? She studies lichen, and she is asked about everything else.

On the tenth of January the wind turned to the east and the pressure began to rise: 970 at seven, 978 at noon, 985
by the time it was dark. The lake had frozen from the shore to the first island. Bertil found his mallet under the
mast, frozen to the rock, and freed it with hot water from the kitchen. Tomas said that this was the most expensive
litre of water he had ever boiled. Ines wrote both facts into the log, the pressure first and the mallet second, and
Yuki Arden, who had been out to look at her lichen, added in pencil that it was quite unharmed.

On the eleventh the radio worked again. The mainland asked for the lowest pressure, and Ines said 962. It asked for
the date, and she said the ninth of January. It asked how many people were at Holm Point, and whether all four of
them were well. "Four," said Ines, "and all of them are well, except for the one who lost his mallet, and he has
found it."
)";
}

}  // namespace nb::text
