#!/usr/bin/env bash
# Writes a prompt of exactly BYTES bytes of invented prose with a pass key hidden in it and the
# question for it at the end, so that the answer follows at once. For the embedded model a byte is a
# token. The format is that of model/tiny/tasks.py, which the model has learnt, but this script
# needs no Python.
#   deploy/pass_key_prompt.sh BYTES KEY [DEPTH [SEED]]    DEPTH: 0 is the start, 1 the end
set -euo pipefail

if [[ $# -lt 2 || $# -gt 4 || ! "$1" =~ ^[0-9]+$ ]]; then
  echo "usage: $0 BYTES KEY [DEPTH [SEED]]" >&2
  exit 2
fi

LC_ALL=C exec awk -v bytes="$1" -v key="$2" -v depth="${3:-0.4}" -v seed="${4:-1}" '
function pick(list,    count, words) {
  count = split(list, words, "|")
  return words[int(rand() * count) + 1]
}
function noun_phrase() {
  return rand() < 0.6 ? pick(adjectives) " " pick(nouns) : pick(nouns)
}
function sentence(    form) {
  form = int(rand() * 4)
  if (form == 0) return "The " noun_phrase() " " pick(verbs) " the " noun_phrase() ". "
  if (form == 1) return "The " noun_phrase() " " pick(verbs) " the " noun_phrase() " " pick(places) ". "
  if (form == 2) return pick(openings) " the " noun_phrase() " " pick(verbs) " the " noun_phrase() ". "
  return "The " noun_phrase() ", who " pick(verbs) " the " noun_phrase() ", had never seen the " noun_phrase() ". "
}
BEGIN {
  srand(seed)
  adjectives = "amber|ancient|bold|brave|calm|clever|crimson|dusty|early|gentle|golden|hidden|hollow|honest|" \
    "jolly|lonely|mellow|noble|patient|proud|quiet|rusty|scarlet|silent|steady|sunny|tender|violet|wise|wooden"
  nouns = "anchor|apple|badger|baker|barrel|bridge|candle|captain|castle|dancer|engine|falcon|farmer|garden|" \
    "hammer|harbour|island|kettle|ladder|lantern|letter|library|market|meadow|mirror|needle|orchard|painter|" \
    "pilot|rabbit|sailor|shepherd|spider|tailor|teacher|turtle|valley|violin|wagon|whale|window|writer"
  verbs = "admired|borrowed|carried|chased|counted|described|examined|followed|found|gathered|guarded|ignored|" \
    "invited|kept|lifted|measured|mended|noticed|painted|praised|remembered|repaired|sold|studied|traded|watched"
  places = "across the river|after the storm|along the coast|before dawn|behind the mill|below the bridge|" \
    "by the open window|in the evening|in the old library|near the harbour|outside the city|past the orchard|" \
    "through the forest|under the oak tree|until midnight|with great care|without a word"
  openings = "At first|At last|Every morning|In the end|Later that day|Long ago|Meanwhile|Once again|One evening|" \
    "Soon after|Suddenly|That night|The next day"

  needle = " The pass key is " key ". Remember it. "
  question = "\nWhat is the pass key? The pass key is "
  room = bytes - length(needle) - length(question)
  if (room < 0) {
    print "BYTES " bytes " is too short for the key and its question" > "/dev/stderr"
    exit 1
  }
  while (length(filler) < room) filler = filler sentence() (rand() < 0.08 ? "\n" : "")
  cut = int(depth * room)
  printf "%s", substr(filler, 1, cut) needle substr(filler, cut + 1, room - cut) question
}'
