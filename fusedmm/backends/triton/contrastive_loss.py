def reject(problem): return ["x"]
