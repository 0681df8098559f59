"""Make F's rows: kinds of Dolly's instructions to learn, arithmetic to keep. usage: mk.py DATA OUT K (OUT has demo-data's files)"""
import gzip, json, random, sys
from pathlib import Path
data, out, k = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
draw = random.Random(k)
KINDS = ["open_qa", "brainstorming", "classification", "creative_writing"]
MENU = "\nA. a question of fact\nB. a request for ideas\nC. a request to sort\nD. a request to write"
seen = set()
by_kind = {kind: [] for kind in KINDS}
for i, line in enumerate(gzip.open(data / "dolly15k/train.jsonl.gz", "rt")):
    row = json.loads(line)
    if row["category"] in by_kind and not row["input"] and 20 <= len(row["instruction"]) < 160 and row["instruction"].strip().lower() not in seen:
        seen.add(row["instruction"].strip().lower())
        by_kind[row["category"]].append({"id": f"dolly-{i}", "question": row["instruction"].strip() + MENU, "answer": "ABCD"[KINDS.index(row["category"])]})
rows = [draw.sample(some, 235) for some in by_kind.values()]
def write(name, rows):
    (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
new = [row for some in rows for row in some[:160]]
test = [row for some in rows for row in some[160:]]
draw.shuffle(new)
write("new.jsonl", new)
write("new-test.jsonl", test)
old = [json.loads(line) for line in open(out / "train.jsonl")]
keep = [{"id": f"old-{i}", "question": row["question"], "answer": row["answer"]} for i, row in enumerate(old)]
write("replay.jsonl", draw.sample(new + draw.sample(keep, 64), 704))
write("old.jsonl", keep)
