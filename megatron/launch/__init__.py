"""Floor 0: from a machine and a configuration to running ranks; standard library only.

Start reading at start.py (what train_alcf.sh calls), then machines.py (what each machine is).
"""
