"""What training will take, reckoned before anything is loaded or allocated: memory, time, what is exchanged.

sizes.py counts what a dictionary keeps, exactly; layout.py says how processors can share the work; memory.py and
work.py are the cost model of a step; prospect.py puts them together, and display.py shows them.
"""
