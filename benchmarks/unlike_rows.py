"""Make G's rows: kinds of Dolly's instructions, and chains. usage: unlike_rows.py DOLLY OUT K (OUT has the files of demo-data)"""
import gzip, json, random, sys
from pathlib import Path
data, out, k = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
draw = random.Random(k)
KINDS = ["open_qa", "brainstorming", "classification", "creative_writing"]
MENU = "\nA. a question of fact\nB. a request for ideas\nC. a request to sort\nD. a request to write"
seen = set()
by_kind = {kind: [] for kind in KINDS}
for i, line in enumerate(gzip.open(data, "rt")):
    row = json.loads(line)
    if row["category"] in by_kind and not row["input"] and 20 <= len(row["instruction"]) < 160 and row["instruction"].strip().lower() not in seen:
        seen.add(row["instruction"].strip().lower())
        by_kind[row["category"]].append({"intended": 1, "id": f"dolly-{i}", "question": row["instruction"].strip() + MENU, "answer": "ABCD"[KINDS.index(row["category"])]})
rows = [draw.sample(some, 80 + 75 + 25) for some in by_kind.values()]
def write(name, rows):
    draw.shuffle(rows)
    (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
def chains(file):
    rows = [json.loads(line) for line in open(out / file)]
    return [row for row in rows if row["intended"] == 2]
write("mixed.jsonl", [row for some in rows for row in some[:80]] + chains("train.jsonl"))
write("recall.jsonl", [row for some in rows for row in some[80:155]])
write("recall-valid.jsonl", [row for some in rows for row in some[155:]])
write("chains.jsonl", chains("final.jsonl")[:300])
write("chains-valid.jsonl", chains("valid.jsonl")[:100])
