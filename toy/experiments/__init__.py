"""The experiments of the study, one module each: what is measured, what is drawn, what is expected."""
