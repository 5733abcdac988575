"""The stored arrays, and the small contracts that the stages share. Imports no stage."""
